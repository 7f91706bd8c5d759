"""Building corpora: time beside the plainest way to write the same arrays, growth with processes, and memory.

    python benchmarks/corpus.py                                   # everything, up to 10,000 subjects: 20 minutes
    python benchmarks/corpus.py --rounds 1 --captures 2 --times 1 --many 100 300

Speed, one process, in turns, the fastest of the rounds; every file is flushed to the disk:
  straight   the arrays of all subjects are in memory; tokenize them and write them with pyarrow
  reading    from the subject folders to those arrays, and nothing else
  ours       `build` from the subject folders: read, check, tokenize, write, checksums, card
  limits     the bytes of the corpus copied in memory, and written to one file
Subjects: "captures" have 27,000 points on 10,144 faces and 128 images of 512 x 512 pixels (noise that takes PNG a quarter
of a megabyte, as a head does), "clouds" the points alone, "small" ones 100 points on 600 faces and one image of 16 x 16.
Processes: a build of more subjects (`--times`, hard links to the same ones) with 1 and 2, less the start of the pool. Beside it
what two processes gain on a plain loop (little on a busy machine), the processor time of one process, which is above its
wall time because a thread computes checksums, and how long the bytes of the corpus alone take to the disk.
Memory: the largest sum of resident memory of `build_corpus` and of `synthesize --corpus` with all their processes, sampled
five times a second. Of the many subjects most are hard links, to 20 (captures: 6), each with an id of its own.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from report import markdown_table, write_report

from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.captures.frame import Frame
from gaussian_tokenizer.captures.subject import Subject, find_subjects, write_subject
from gaussian_tokenizer.corpus.building import build
from gaussian_tokenizer.corpus.corpus import load_corpus
from gaussian_tokenizer.corpus.shards import ROW_GROUP_BYTES
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.heads.procedural_head import build_procedural_head
from gaussian_tokenizer.rendering.cameras import portrait_cameras
from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer
from gaussian_tokenizer.utils.parallel import runner

ABOUT = {"license": "CC0-1.0", "consent": "synthetic, no person"}


@dataclass(frozen=True)
class Kind:
    """Size of a subject."""

    faces: int
    points: int
    cameras: int
    timesteps: int
    pixels: int


CAPTURE, CLOUD = Kind(10_144, 27_000, 16, 8, 512), Kind(10_144, 27_000, 0, 1, 16)
SMALL = Kind(600, 100, 1, 1, 16)
SEEDS = {CAPTURE: 6, CLOUD: 20, SMALL: 20}  # different subjects among the many


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captures", type=int, default=6, help="subjects of the size of a capture, 33 MB each")
    parser.add_argument("--clouds", type=int, default=300, help="subjects without images")
    parser.add_argument("--small", type=int, default=600, help="small subjects")
    parser.add_argument("--times", type=int, default=6, help="so many times those, to build with two processes")
    parser.add_argument("--many", type=int, nargs="+", default=[100, 1_000, 10_000], help="subjects, for the memory")
    parser.add_argument("--num_proc", type=int, default=2, help="processes for those")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to work; the temporary folder by default")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        sets = {"captures": (CAPTURE, arguments.captures), "clouds": (CLOUD, arguments.clouds)}
        sets["small"] = (SMALL, arguments.small)
        speed, processes = [], []
        for name, (kind, number) in sets.items():
            subjects = make_many(folder / name, number, kind)
            speed += measure_speed(name, subjects, kind, folder, arguments.rounds)
            shutil.rmtree(subjects)
            print(markdown_table(speed), "\n", flush=True)
            subjects = make_many(folder / name, arguments.times * number, kind)
            processes.append(measure_processes(name, subjects, kind, folder, arguments.rounds))
            shutil.rmtree(subjects)
            print(markdown_table(processes), "\n", flush=True)
        memory = measure_many(arguments.many, arguments.num_proc, folder)
    print(markdown_table(memory), "\n", flush=True)
    targets = judge(speed, processes, memory)
    print(markdown_table(targets))
    print(f"\nwritten: {write_report('corpus', speed, processes=processes, memory=memory, targets=targets)}")


def judge(speed: list[dict], processes: list[dict], memory: list[dict]) -> list[dict]:
    targets = []
    for name in ("captures", "clouds"):
        seconds = {row["what"]: row["seconds"] for row in speed if row["subjects of"] == name}
        # `straight` begins with arrays; ours has first to get them out of the folders.
        targets.append(
            (f"{name}: (ours - reading) / straight", (seconds["ours"] - seconds["reading"]) / seconds["straight"], 2.0)
        )
        plain = seconds["reading"] + seconds["straight"]
        targets.append((f"{name}: ours / (reading + straight)", seconds["ours"] / plain, 2.0))
    for row in processes:
        # One process already uses more than one core: a thread of it computes checksums and waits for the disk.
        shortest = max(
            row["1 process, CPU s"] / row["speed-up of a plain loop"], row["limit: its bytes to the disk, s"]
        )
        name = f"{row['subjects of']}: time of 2 processes / what their computing or the disk take at least"
        targets.append((name, row["2 processes, s"] / shortest, 1.25))
    for command in dict.fromkeys(row["command"] for row in memory):
        own = [row for row in memory if row["command"] == command]
        name = f"{command}: memory with {own[-1]['subjects']:,} subjects / with {own[0]['subjects']:,}"
        targets.append((name, own[-1]["peak MB"] / own[0]["peak MB"], 1.2))
        if len(own) > 1:
            few, most = own[-2:]
            growth = np.log(most["CPU seconds"] / few["CPU seconds"]) / np.log(most["subjects"] / few["subjects"])
            targets.append(
                (f"{command}: exponent of the time's growth from {few['subjects']:,} on", float(growth), 1.1)
            )
    return [
        {"target": name, "measured": value, "at most": most, "reached": value <= most} for name, value, most in targets
    ]


# ---- speed


def measure_speed(name: str, subjects: Path, kind: Kind, folder: Path, rounds: int) -> list[dict]:
    head = build_procedural_head(kind.faces)
    arrays = [read(subject, head) for subject in find_subjects(subjects)]
    build(subjects, head, folder / "corpus", progress=False)
    tokenizer = load_corpus(folder / "corpus").tokenizer
    content = b"".join(path.read_bytes() for path in sorted((folder / "corpus").rglob("*.parquet")))
    calls: dict[str, Callable[[], object]] = {
        "straight": lambda: write_straight(arrays, tokenizer, folder / "straight"),
        "reading": lambda: [read(subject, head) for subject in find_subjects(subjects)],
        "ours": lambda: build(subjects, head, folder / "corpus", progress=False),
        "limit: copy in memory": lambda: bytearray(content),
        "limit: write to one file": lambda: write_file(folder / "bytes", content),
    }
    best = dict.fromkeys(calls, float("inf"))
    computing = dict(best)
    for _ in range(rounds):
        for what, call in calls.items():
            shutil.rmtree(folder / "corpus", ignore_errors=True)
            os.sync()  # what the one before left to be written is not this one's
            start, busy = time.perf_counter(), time.process_time()
            call()
            best[what] = min(best[what], time.perf_counter() - start)
            computing[what] = min(computing[what], time.process_time() - busy)
    shutil.rmtree(folder / "corpus", ignore_errors=True)
    return [
        {
            "subjects of": name,
            "number": len(arrays),
            "what": what,
            "seconds": seconds,
            "CPU seconds": computing[what],
            "ms a subject": 1000 * seconds / len(arrays),
            "MB/s": len(content) / seconds / 1e6,
            "x straight": seconds / best["straight"],
        }
        for what, seconds in best.items()
    ]


def read(subject: Subject, head: HeadModel) -> dict:
    """The arrays a corpus holds of a subject, by configuration and column, but for the ids."""
    avatar = subject.load_avatar(head)
    assert avatar.params is not None
    points, vertices = avatar.canonical_points(), head.canonical_vertices(avatar.params)
    row = {name: value[:1].numpy().ravel() for name, value in avatar.params.tensors().items() if name != "shape"}
    row |= {"shape": avatar.params.shape.numpy(), "head_vertices": vertices.numpy().ravel()}
    row["head_normals"] = head.normals(vertices).numpy().astype(np.float16).ravel()
    pose: dict[Path, dict] = {}
    frames = []
    for frame in subject.frames():
        if frame.params not in pose:
            values = frame.load_params().tensors()
            pose[frame.params] = {name: value[0].numpy() for name, value in values.items() if name != "shape"}
        numbers = {
            name: getattr(frame, name) for name in ("timestep", "camera", "fx", "fy", "cx", "cy", "width", "height")
        }
        viewmat = frame.viewmat.astype(np.float32).ravel()
        frames.append({"image": frame.image_bytes(), **numbers, "viewmat": viewmat, **pose[frame.params]})
    return {
        "id": subject.avatar_id,
        "metadata": json.dumps(subject.metadata),
        "points": points,
        "row": row,
        "frames": frames,
    }


def write_straight(subjects: Sequence[dict], tokenizer: GaussianTokenizer, folder: Path) -> None:
    """Tokenize and write: one table of avatars and one of frames, in row groups as large as ours."""
    folder.mkdir(exist_ok=True)
    avatars, frames = [], []
    for subject in subjects:
        ids = tokenizer(subject["points"], on_out_of_bounds="ignore")["input_ids"]
        about = {"avatar_id": subject["id"], "metadata": subject["metadata"], "num_points": len(ids) // 4}
        avatars.append({**about, "input_ids": ids, **subject["row"]})
        frames += [{"avatar_id": subject["id"], **frame} for frame in subject["frames"]]
    for name, rows, size in (("avatars", avatars, 0), ("frames", frames, 0)):
        if not rows:
            continue
        size += len(rows[0].get("image", b""))
        size += sum(value.nbytes for value in rows[0].values() if isinstance(value, np.ndarray))
        step = min(1000, max(1, ROW_GROUP_BYTES // size))
        with open(folder / f"{name}.parquet", "wb") as file:
            writer = None
            for start in range(0, len(rows), step):
                group = rows[start : start + step]
                table = pa.table({key: pa.array([row[key] for row in group]) for key in group[0]})
                others = [key for key in table.column_names if key != "image"]
                if writer is None:
                    leaves = [f"{key}.list.element" if pa.types.is_list(table[key].type) else key for key in others]
                    options = {"use_dictionary": leaves, "write_statistics": leaves}
                    writer = pq.ParquetWriter(file, table.schema, compression=dict.fromkeys(leaves, "zstd"), **options)
                writer.write_table(table)
            assert writer is not None
            writer.close()
            file.flush()
            os.fsync(file.fileno())


def write_file(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


# ---- processes


def measure_processes(name: str, subjects: Path, kind: Kind, folder: Path, rounds: int) -> dict:
    head = build_procedural_head(kind.faces)
    seconds, loop = ({1: float("inf"), 2: float("inf")} for _ in range(2))
    disk = computing = float("inf")
    shards = 0
    start_of_pool(head, folder)  # the first one also starts the server that forks them
    for _ in range(rounds):
        for number in seconds:
            os.sync()
            start, busy = time.perf_counter(), time.process_time()
            shards = len(build(subjects, head, folder / "corpus", num_proc=number, progress=False)["shards"])
            took = time.perf_counter() - start - (start_of_pool(head, folder) if number > 1 else 0)
            seconds[number] = min(seconds[number], took)
            if number == 1:
                computing = min(computing, time.process_time() - busy)
            loop[number] = min(loop[number], plain_loop(number))
            content = b"".join(path.read_bytes() for path in sorted((folder / "corpus").rglob("*.parquet")))
            shutil.rmtree(folder / "corpus")
            start = time.perf_counter()
            write_file(folder / "bytes", content)
            disk = min(disk, time.perf_counter() - start)
            (folder / "bytes").unlink()
    return {
        "subjects of": name,
        "number": len(find_subjects(subjects)),
        "shards": shards,
        "1 process, s": seconds[1],
        "1 process, CPU s": computing,
        "2 processes, s": seconds[2],
        "speed-up": seconds[1] / seconds[2],
        "speed-up of a plain loop": loop[1] / loop[2],
        "limit: its bytes to the disk, s": disk,
    }


def start_of_pool(head: HeadModel, folder: Path) -> float:
    """Seconds until two processes are there and have answered."""
    head.save(folder / "head.safetensors")
    start = time.perf_counter()
    with runner(2, partial(HeadModel.load, folder / "head.safetensors")) as run:
        run(answer, [(0.5,)] * 2, "", progress=False)
    return time.perf_counter() - start - 0.5


def answer(seconds: float, head: HeadModel) -> None:
    time.sleep(seconds)  # so that each of the two processes gets one


def plain_loop(num_proc: int) -> float:
    """Seconds that 2 x 20 million additions take on so many processes; their start is not counted."""
    with multiprocessing.get_context("fork").Pool(num_proc) as pool:
        start = time.perf_counter()
        pool.map(add, [20_000_000] * 2, chunksize=1)
        return time.perf_counter() - start


def add(count: int) -> int:
    return sum(range(count))


# ---- memory


def measure_many(numbers: Sequence[int], num_proc: int, folder: Path) -> list[dict]:
    rows = []
    common = f"--head procedural:{SMALL.faces} --num_proc {num_proc}"
    for number in numbers:
        subjects = make_many(folder / "many", number, SMALL)
        options = f"{common} --avatars {subjects} --output_dir {folder / 'corpus'}"
        rows.append(measure_command("build_corpus", number, options, folder))
        shutil.rmtree(subjects)
    for number in numbers:
        options = f"{common} --num_subjects {number} --corpus {folder / 'corpus'}"
        options += f" --num_points {SMALL.points} --image_size {SMALL.pixels} --placement regular --plain"
        rows.append(measure_command("synthesize", number, options, folder))
    return rows


def measure_command(name: str, number: int, options: str, folder: Path) -> dict:
    start = time.perf_counter()
    words = [sys.executable, "-m", f"gaussian_tokenizer.{name}", *options.split()]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak, computing = 0, dict[int, float]()
    while process.poll() is None:
        members = family(process.pid)
        peak = max(peak, sum(resident(pid) for pid in members))
        for pid in members:  # some end before this process does: the last sample counts
            computing[pid] = max(computing.get(pid, 0.0), processor_time(pid))
        time.sleep(0.2)
    assert process.returncode == 0, words
    seconds = time.perf_counter() - start
    size = sum(path.stat().st_size for path in (folder / "corpus").rglob("*") if path.is_file())
    shutil.rmtree(folder / "corpus")
    row = {"command": name, "subjects": number, "seconds": seconds, "CPU seconds": sum(computing.values())}
    row |= {"corpus MB": size / 1e6, "peak MB": peak / 2**20}
    print(
        ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in row.items()),
        flush=True,
    )
    return row


def family(pid: int) -> list[int]:
    try:
        threads = Path(f"/proc/{pid}/task").iterdir()
        children = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    except OSError:  # gone meanwhile
        return [pid]
    return [pid, *(member for child in children for member in family(child))]


def processor_time(pid: int) -> float:
    """Seconds of one process, its children not counted; 0 if it is gone."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return 0.0


def resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return 0


# ---- subjects


def make_subjects(folder: Path, number: int, kind: Kind) -> Path:
    """So many different subject folders."""
    head = build_procedural_head(kind.faces)
    cameras = portrait_cameras(head, kind.pixels, [20.0 * number for number in range(kind.cameras)])
    for seed in range(number):
        generator, noise = torch.Generator().manual_seed(seed), np.random.default_rng(seed)

        def normal(*shape: int, generator: torch.Generator = generator) -> torch.Tensor:
            return 0.3 * torch.randn(shape, generator=generator)

        params = HeadParameters.zeros(head.n_shape, head.n_expression, kind.timesteps)
        params.shape.copy_(normal(head.n_shape))
        params.expr.copy_(normal(kind.timesteps, head.n_expression))
        faces = torch.randint(0, head.n_faces, (kind.points,), generator=generator)
        tensors = {"sh": normal(kind.points, 1, 3), "opacities": normal(kind.points), "scales": normal(kind.points, 3)}
        avatar = GaussianAvatar(normal(kind.points, 3), faces, quats=normal(kind.points, 4), params=params, **tensors)
        frames = []
        for timestep in range(kind.timesteps):
            for camera in range(kind.cameras):
                waves = np.cumsum(noise.normal(0, 1, (kind.pixels, kind.pixels, 3)), axis=0) + 128
                (fx, _, cx), (_, fy, cy) = cameras.Ks[camera, :2].tolist()
                frames.append(
                    Frame(
                        timestep,
                        camera,
                        cameras.viewmats[camera].double().numpy(),
                        *(fx, fy, cx, cy, kind.pixels, kind.pixels),
                        image=Image.fromarray(waves.clip(0, 255).astype(np.uint8)),
                        params=params.frame(timestep),
                    )
                )
        write_subject(folder / f"s{seed:05d}", avatar.with_head(head), frames, ABOUT)
    return folder


def make_many(folder: Path, number: int, kind: Kind) -> Path:
    """So many folders whose files are hard links to those of a few subjects, but for the metadata with their ids."""
    seeds = sorted(make_subjects(folder.with_name("seeds"), min(number, SEEDS[kind]), kind).iterdir())
    for index in range(number):
        copy = shutil.copytree(seeds[index % len(seeds)], folder / f"m{index:06d}", copy_function=os.link)
        path = Path(copy) / "metadata.json"
        metadata = json.loads(path.read_text()) | {"avatar_id": f"m{index:06d}"}
        path.unlink()
        path.write_text(json.dumps(metadata))
    shutil.rmtree(folder.with_name("seeds"))
    return folder


if __name__ == "__main__":
    main()
