"""Kill every long command with SIGKILL at random moments, run it again until it is done, and compare bytes.

    make chaos                                                          # 100 kills
    make chaos KILLS=10 SEED=3 CHAOS="--minutes 5 --only fit corpus"

What a command leaves after any number of kills must be what it leaves undisturbed: the same files, the same bytes, and nothing
else, but for the entries of JSON files that tell the time (`CLOCK`). All processes of a command die at once, half of the times a
moment after it has changed something in its folder, which is where writes are caught. Exits with 1 if anything differed.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
TRAINING = ROOT / "training"
# Entries of JSON files that depend on the clock; an entry of the log with `train_runtime` speaks of the last start alone.
CLOCK = {"eval_runtime", "heldout_runtime", "tokens_per_second", "mfu", "seconds"}
OF_ONE_START = "train_runtime"
MAX_KILLS_IN_A_ROUND = 4
POLL_SECONDS = 0.004
LONGEST_DELAY = 0.05  # seconds from a change in the folder to the kill
TIMEOUT = 900  # seconds; a run that takes longer hangs
MARK = "CHAOS_RUN"  # in the environment of every process of a run, wherever its launchers put it


@dataclass(frozen=True)
class Kind:
    """A command that leaves everything in `out`, a folder where it is started.

    `refusal`: what it says when it fails because all is done, if it does.
    """

    name: str
    words: tuple[str | Path, ...]
    refusal: str | None = None


@dataclass
class Tally:
    """Figures of a kind."""

    seconds: float = 0.0  # of the undisturbed run
    changes: int = 0  # in its folder
    rounds: int = 0
    kills: int = 0
    starts: int = 0
    findings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Moment:
    """When to kill: after so many changes in the folder or, with none, seconds after the start."""

    changes: int | None
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="stop after so many in all (default 100)")
    parser.add_argument("--minutes", type=float, help="stop earlier, after so many minutes")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--only", nargs="+", metavar="KIND", help="synthesize, corpus, fit, pretrain, decoder, zero2")
    parser.add_argument("--work", type=Path, help="empty folder to work in; kept if anything differed (default: new)")
    options = parser.parse_args(arguments)
    work = options.work or Path(tempfile.mkdtemp(prefix="chaos-"))
    work.mkdir(parents=True, exist_ok=True)
    kinds = all_kinds(work.resolve())
    wanted = options.only or list(kinds)
    if unknown := set(wanted) - set(kinds):
        parser.error(f"no kind {', '.join(sorted(unknown))}; there are {', '.join(kinds)}")
    end = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    tallies = {name: Tally() for name in needed(wanted)}
    for name, tally in tallies.items():
        tally.seconds, tally.changes = undisturbed(kinds[name], reference_of(work, name))
        print(f"{name}: undisturbed in {tally.seconds:.1f} s, {tally.changes} changes seen in its folder", flush=True)
    done = 0
    while done < options.kills and time.monotonic() < end:
        name = min(wanted, key=lambda name: tallies[name].kills)
        tally = tallies[name]
        tally.rounds += 1
        dice = random.Random(f"{options.seed} {name} {tally.rounds}")
        most = max(1, min(MAX_KILLS_IN_A_ROUND, options.kills // len(wanted)))
        kills = min(dice.randint(1, most), options.kills - done)
        before, found = tally.kills, len(tally.findings)
        try:
            disturbed(kinds[name], work, tally, kills, dice)
        except RuntimeError as error:
            tally.findings.append(str(error))
        done += tally.kills - before
        outcome = "; ".join(tally.findings[found:]) or "equal"
        print(f"{name} round {tally.rounds}: {tally.kills - before} kills, {outcome}", flush=True)
    print(f"\n{'kind':<12}{'rounds':>8}{'kills':>8}{'starts':>8}  output")
    for name in wanted:
        tally = tallies[name]
        outcome = f"{len(tally.findings)} DIFFERENT" if tally.findings else "equal" if tally.rounds else "not tried"
        print(f"{name:<12}{tally.rounds:>8}{tally.kills:>8}{tally.starts:>8}  {outcome}")
    findings = sum(len(tallies[name].findings) for name in wanted)
    print(f"{done} kills, {findings} findings" + (f"; see {work}" if findings else ""))
    if not findings and options.work is None:
        shutil.rmtree(work)
    return 1 if findings else 0


# ---- the commands


def all_kinds(work: Path) -> dict[str, Kind]:
    """Each reads what undisturbed runs of others left: subjects, their corpus, a point model."""
    subjects, corpus, model = (reference_of(work, name) / "out" for name in ("synthesize", "corpus", "pretrain"))
    python, head = (sys.executable,), ("--head", "procedural:600")
    steps = ("--max_steps", "12", "--save_steps", "3", "--eval_steps", "5", "--save_total_limit", "2")
    training = (*steps, "--disable_tqdm", "true", "--num_threads", "1", "--output_dir", "out")
    training += ("--resume_from_checkpoint", "true", "--corpus", corpus / "corpus")
    pretrain = (TRAINING / "pretrain.py", TRAINING / "configs" / "debug.yaml", *training)
    launch = (Path(sys.executable).with_name("accelerate"), "launch", "--main_process_port", "0", "--config_file")
    kinds = (
        Kind("synthesize", (*python, "-m", "gaussian_tokenizer.synthesize", "--output_dir", "out", *head, "--num_proc", "2",
                            "--num_subjects", "6", "--image_size", "56", "--num_points", "60", "--views", "2",
                            "--timesteps", "2", "--plain")),
        Kind("corpus", (*python, "-m", "gaussian_tokenizer.build_corpus", "--avatars", subjects, *head, "--num_proc", "2",
                        "--output_dir", "out/corpus", "--n_bins", "64", "--image_size", "56", "--num_validation", "2",
                        "--shard_size", "60KB"), refusal="out/corpus: exists already"),
        Kind("fit", (*python, TRAINING / "fit_avatars.py", TRAINING / "configs" / "fit_debug.yaml", "--data", subjects,
                     *head, "--output_dir", "out", "--device", "cpu", "--disable_tqdm", "true")),
        Kind("pretrain", (*python, *pretrain)),
        Kind("decoder", (*python, TRAINING / "train_gaussian_decoder.py", TRAINING / "configs" / "decoder_debug.yaml",
                         *head, *training, "--point_model", model, "--self_generated_ratio", "0.3",
                         "--feature_cache", "out/cache")),
        Kind("zero2", (*launch, TRAINING / "configs" / "accelerate" / "cpu_zero2.yaml", *pretrain,
                       "--per_device_train_batch_size", "1")),
    )  # fmt: skip
    return {kind.name: kind for kind in kinds}


def needed(wanted: Sequence[str]) -> list[str]:
    """The wanted kinds and those they read, in an order that works."""
    reads = {"corpus": ("synthesize",), "fit": ("synthesize",), "pretrain": ("corpus",), "zero2": ("corpus",)}
    reads["decoder"] = ("pretrain", "corpus")
    order: list[str] = []

    def add(name: str) -> None:
        for other in reads.get(name, ()):
            add(other)
        if name not in order:
            order.append(name)

    for name in wanted:
        add(name)
    return order


def reference_of(work: Path, name: str) -> Path:
    return work / name / "undisturbed"


# ---- running and killing


def undisturbed(kind: Kind, folder: Path) -> tuple[float, int]:
    """Run to the end; returns seconds and how many changes of the folder were seen."""
    begin = time.monotonic()
    run = Run(kind, folder)
    changes = run.watch()
    run.require_success()
    return time.monotonic() - begin, changes


def disturbed(kind: Kind, work: Path, tally: Tally, kills: int, dice: random.Random) -> None:
    """Kill the command so many times, or until it is done before it is killed; run it to the end and compare.

    Raises:
        RuntimeError: it failed, or left something else than undisturbed.
    """
    folder = work / kind.name / f"round-{tally.rounds}"
    seen, over = 0, False
    for _ in range(kills):
        tally.starts += 1
        run = Run(kind, folder)
        moment = Moment(None, dice.uniform(0, tally.seconds))
        if dice.random() < 0.75:
            moment = Moment(dice.randint(1, max(1, tally.changes - seen)), dice.uniform(0, LONGEST_DELAY))
        seen += run.watch(moment)
        if over := run.over():
            break
        run.kill()
        tally.kills += 1
    if not over:
        tally.starts += 1
        run = Run(kind, folder)
        run.watch()
    run.require_success(after_a_kill=True)
    if different := differences(reference_of(work, kind.name) / "out", folder / "out"):
        raise RuntimeError(f"round {tally.rounds} left something else: {', '.join(different)}")
    shutil.rmtree(folder)


class Run:
    """A command that has been started in a folder."""

    def __init__(self, kind: Kind, folder: Path):
        (folder / "out").mkdir(parents=True, exist_ok=True)
        self.kind, self.folder, self.mark = kind, folder, uuid.uuid4().hex
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(folder.parents[1] / "datasets_cache"),
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": path,
            MARK: self.mark,
        }
        with open(folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [str(word) for word in kind.words],
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def watch(self, moment: Moment | None = None) -> int:
        """Wait until `moment` or the end; returns how many changes of the folder were seen."""
        begin, changes, state = time.monotonic(), 0, snapshot(self.folder / "out")
        while not self.over():
            if time.monotonic() - begin > TIMEOUT:
                self.kill()
                raise RuntimeError(f"{self.kind.name} hangs, see {self.folder / 'log'}")
            if moment and moment.changes is None and time.monotonic() - begin >= moment.seconds:
                break
            time.sleep(POLL_SECONDS)
            now = snapshot(self.folder / "out")
            changes += now != state
            state = now
            if moment and moment.changes is not None and changes >= moment.changes:
                time.sleep(moment.seconds)
                break
        return changes

    def over(self) -> bool:
        return self.process.poll() is not None

    def kill(self) -> None:
        """All of its processes, wherever launchers put them."""
        while family := list(self.family()):
            for member in family:
                with suppress(psutil.NoSuchProcess):
                    member.kill()
            psutil.wait_procs(family, timeout=10)
        self.process.wait()

    def family(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    yield process

    def require_success(self, after_a_kill: bool = False) -> None:
        if status := self.process.wait():
            last = (self.folder / "log").read_text(errors="replace").strip().splitlines()[-12:]
            # It was killed when the output had its name, and before it could say so.
            if after_a_kill and self.kind.refusal and self.kind.refusal in last[-1]:
                return
            raise RuntimeError("\n    ".join((f"{self.kind.name} exited with {status} in {self.folder}:", *last)))


def snapshot(folder: Path) -> list[tuple[str, int]]:
    """Names and sizes of all that is in a folder."""
    found = []
    for where, folders, files in os.walk(folder):
        found += [(os.path.join(where, name), -1) for name in folders]
        for name in files:
            path = os.path.join(where, name)
            with suppress(FileNotFoundError):
                found.append((path, os.stat(path).st_size))
    return found


# ---- comparing


def differences(expected: Path, found: Path) -> list[str]:
    """Names of files and folders that only one of the two has, or that differ."""
    contents = [content(folder) for folder in (expected, found)]
    return sorted(
        name for name in contents[0].keys() | contents[1].keys() if contents[0].get(name) != contents[1].get(name)
    )


def content(folder: Path) -> dict[str, Any]:
    """Bytes of every file, of JSON files what they say without the time; None for a folder."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            found[name] = None
        elif path.suffix == ".json":
            found[name] = timeless(json.loads(path.read_bytes()))
        else:
            found[name] = path.read_bytes()
    return found


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: timeless(entry) for name, entry in value.items() if name not in CLOCK}
    if isinstance(value, list):
        return [timeless(entry) for entry in value if not (isinstance(entry, dict) and OF_ONE_START in entry)]
    return value


if __name__ == "__main__":
    sys.exit(main())
