"""Who is driven by whom, the same images for every method, and the folders in which methods hand in their frames.

Self-reenactment: the first frame of a clip (the first moment in the camera of the lowest number) is the source, the others, of all
cameras, drive, and they are the truth. Cross-reenactment:
another subject of the dataset drives, drawn by the seed, so that each subject is a source once and a driver once.
`export_protocol` writes sources and drivers for somebody who runs another method; what comes back is a folder

    <DIR>/<mode>/<source>__<driver>/<row of the driver's frame, 00001>.png      or <DIR>/<mode>/<source>__<driver>.mp4

and `check_frames` lists everything in it that is not as it must be.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from eval.reenactment.clips import Clip, on_white
from gaussian_tokenizer.captures.frame import load_image
from gaussian_tokenizer.utils.atomic import atomic_folder

MODES = ("self", "cross")
FORMAT = "avatar-pointillist reenactment protocol 1"


@dataclass(frozen=True, eq=False)
class Pair:
    """One source and what drives it: every frame of the driver but its first."""

    mode: str
    source: Clip
    driver: Clip

    @property
    def name(self) -> str:
        return f"{self.source.subject_id}__{self.driver.subject_id}"

    @property
    def rows(self) -> range:
        """The driver's frames that are reenacted."""
        return range(1, len(self.driver))

    def path(self, folder: Path) -> Path:
        """Where the frames of this pair lie."""
        return folder / self.mode / self.name


def frame_name(row: int) -> str:
    return f"{row:05d}.png"


def make_pairs(clips: Sequence[Clip], mode: str, seed: int) -> list[Pair]:
    """The pairs of "self", "cross" or "both"; ValueError for cross-reenactment of fewer than two subjects."""
    pairs = [Pair("self", clip, clip) for clip in clips] if mode in ("self", "both") else []
    if mode in ("cross", "both"):
        if len(clips) < 2:
            raise ValueError(
                f"--mode {mode} needs two subjects, one to drive the other; the dataset has {len(clips)}: "
                "give more subjects, or --mode self"
            )
        # One cycle through all of them: nobody drives himself, everybody drives once.
        order = np.random.default_rng(seed).permutation(len(clips))
        driver_of = dict(zip(order.tolist(), np.roll(order, -1).tolist()))
        pairs += [Pair("cross", clip, clips[driver_of[index]]) for index, clip in enumerate(clips)]
    names = [(pair.mode, pair.name) for pair in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two pairs are called {name[1]!r}; give the subjects ids without '__'")
    return pairs


def export_protocol(folder: Path, pairs: Sequence[Pair], seed: int) -> None:
    """Write what another method needs to be compared: a folder, whole or not at all.

    sources/<subject>.png, .npz        the source portrait on white and the head parameters of that frame
    drivers/<subject>/00001.png, ...   the driving frames on white; flame_param.npz, cameras.json: a row a frame, from 0
    protocol.json                      the pairs, and the names of the frames that are expected of each
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: is there and not empty; choose another folder for the protocol")
    sources = {pair.source.subject_id: pair.source for pair in pairs}
    drivers = {pair.driver.subject_id: pair.driver for pair in pairs}
    with atomic_folder(folder) as new:
        (new / "sources").mkdir()
        for name, clip in sources.items():
            Image.fromarray(clip.image(0)).save(new / "sources" / f"{name}.png")
            clip.params.frame(0).save(new / "sources" / f"{name}.npz")
        for name, clip in tqdm(drivers.items(), desc="writing drivers", unit="subject"):
            own = new / "drivers" / name
            own.mkdir(parents=True)
            for row in range(1, len(clip)):
                Image.fromarray(clip.image(row)).save(own / frame_name(row))
            clip.params.save(own / "flame_param.npz")
            _write_json(own / "cameras.json", _cameras(clip))
        width, height = pairs[0].driver.size
        content = {"format": FORMAT, "seed": seed, "width": width, "height": height, "background": "white"}
        _write_json(new / "protocol.json", content | {"pairs": [describe(pair) for pair in pairs]})


def describe(pair: Pair) -> dict:
    """A pair in words, for JSON."""
    return {
        "mode": pair.mode,
        "name": pair.name,
        "source": pair.source.subject_id,
        "source_camera": pair.source.numbers[0],
        "driver": pair.driver.subject_id,
        "driver_cameras": [pair.driver.numbers[row] for row in pair.rows],
        "frames": [frame_name(row) for row in pair.rows],
    }


def in_words(settings: Mapping[str, Any]) -> dict[str, str]:
    """Every choice that a number depends on; `settings` are the flags of the bench."""
    return {
        "frames": "as in the data set, whole images, no mask, laid on white, 8 bits; compared folders likewise",
        "subjects": "sorted by name" + (f", the first {settings['num_subjects']}" if settings['num_subjects'] else ""),
        "camera": f"camera {settings['camera']}" if settings['camera'] is not None else "all, one after the other by number",
        "source": "the first frame of a clip (its first moment in its camera of the lowest number), with its tracked shape and "
        "static offset",
        "self": "the same clip drives from its second frame on, in all its cameras, and is the truth",
        "cross": "another subject's clip drives from its second frame on, with its expression, joint rotations, translation and "
        "camera on the source's shape; a random cycle through all subjects, drawn by the seed, says who drives whom",
        "avatar": f"one for each source, made {settings['batch_size']} at a time with seed {settings['seed']}, "
        f"the likeliest of {settings['candidates']} clouds, "
        f"at most {settings['max_points'] or 'any number of'} points, {settings['max_points_per_face']} on a face; "
        "posed by linear blend skinning",
        "mean": "over all frames of all pairs",
        "intervals": f"95 %, over source subjects: bootstrap, 1,000 draws with seed {settings['seed']}; of FID the jackknife, "
        "because repeated frames raise FID",
        "PSNR": "of an image on 0..255, all channels together, in dB; infinite for equal images",
        "SSIM": "Gaussian window of 11 pixels, sigma 1.5, the mean of three channels",
        "LPIPS": "version 0.1, network under networks, images on -1..1",
        "FID": "Inception's 2,048 features of all frames of a method; self: against the true frames; cross: against the "
        "source's own frames from its second on. It falls with the number of frames: compare only equal numbers",
        "CLIP": "cosine of image features; self: with the true frame; cross: with the source portrait",
        "CSIM": "cosine of ArcFace features; self: with the true frame; cross: with the source portrait",
        "AKD": "mean distance of landmarks to those of the driver's frame, in pixels of an image whose longer side is 512",
        "APD": "head rotation against the driver's frame: mean absolute difference of three Euler angles in milliradians, "
        "which fits the size of published values; geodesic: the angle between the two rotations in degrees",
        "AED": "mean absolute difference of expression coefficients to the driver's frame",
        "no face": "a frame in which the detector finds none, or whose driver's frame has none, enters no mean of AKD, APD, AED "
        "and CSIM, and is counted",
    }  # fmt: skip


@dataclass(frozen=True)
class FrameProblems:
    """What is wrong with a folder of frames in one mode."""

    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()
    wrong_size: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return any(asdict(self).values())

    def lines(self) -> list[str]:
        """One line a problem."""
        return [f"{kind.replace('_', ' ')}: {name}" for kind, names in asdict(self).items() for name in names]


def check_frames(folder: Path, pairs: Sequence[Pair]) -> FrameProblems:
    """Everything in <folder>/<mode> that is not what the pairs of this one mode expect; all frames are opened."""
    mode = pairs[0].mode
    found = {name for path in (folder / mode).rglob("*") if path.is_file() and (name := _visible(path, folder))}
    missing, unreadable, wrong_size = [], [], []
    for pair in tqdm(pairs, desc=f"checking {folder.name} {mode}", unit="pair", leave=False):
        video = pair.path(folder).with_name(f"{pair.name}.mp4")
        if video.is_file():
            name = str(video.relative_to(folder))
            found.discard(name)
            try:
                frames = read_video(video)
            except ValueError as error:
                unreadable.append(str(error))
                continue
            if len(frames) != len(pair.rows):
                missing.append(f"{name} has {len(frames)} frames, expected {len(pair.rows)}")
            if (size := (frames.shape[2], frames.shape[1])) != _video_size(pair):
                wrong_size.append(f"{name} is {size}, expected {_video_size(pair)}")
            continue
        for row in pair.rows:
            path = pair.path(folder) / frame_name(row)
            name = str(path.relative_to(folder))
            if name not in found:
                missing.append(name)
                continue
            found.discard(name)
            try:
                size = load_image(path).size
            except ValueError as error:
                unreadable.append(str(error))
                continue
            if size != pair.driver.size:
                wrong_size.append(f"{name} is {size}, expected {pair.driver.size}")
    return FrameProblems(tuple(missing), tuple(sorted(found)), tuple(unreadable), tuple(wrong_size))


def read_frames(folder: Path, pair: Pair) -> np.ndarray:
    """(N, H, W, 3) uint8, the frames of a pair, on white; ValueError that names one that cannot be read."""
    video = pair.path(folder).with_name(f"{pair.name}.mp4")
    if video.is_file():
        width, height = pair.driver.size
        return read_video(video)[:, :height, :width]
    return np.stack([on_white(load_image(pair.path(folder) / frame_name(row))) for row in pair.rows])


def read_video(path: Path) -> np.ndarray:
    """(N, H, W, 3) uint8 of a video; ValueError if it cannot be decoded, ImportError without imageio-ffmpeg."""
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise ImportError(
            f'{path}: reading videos needs imageio-ffmpeg ({error}): pip install "avatar-pointillist[video]", or give PNG'
        ) from error
    try:
        reader = imageio_ffmpeg.read_frames(str(path))
        width, height = next(reader)["size"]
        frames = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]
    except (OSError, RuntimeError, ValueError, StopIteration) as error:
        raise ValueError(f"{path} is not a readable video: {' '.join(str(error).split())[:200]}") from None
    if not frames:
        raise ValueError(f"{path} is not a readable video: it has no frames")
    return np.stack(frames)


def _video_size(pair: Pair) -> tuple[int, int]:
    """H.264 wants even sides: an odd one gets its last column or row twice."""
    width, height = pair.driver.size
    return width + width % 2, height + height % 2


def _visible(path: Path, folder: Path) -> str:
    """The name relative to the folder; empty for hidden files, which systems leave behind."""
    relative = path.relative_to(folder)
    return "" if any(part.startswith(".") for part in relative.parts) else str(relative)


def _cameras(clip: Clip) -> dict:
    viewmats, Ks = clip.cameras.viewmats.tolist(), clip.cameras.Ks.tolist()
    frames = [{"viewmat": viewmat, "K": K} for viewmat, K in zip(viewmats, Ks)]
    about = "viewmat: world to camera, meters, OpenCV axes (x right, y down, z forward); K: pixels"
    return {"about": about, "width": clip.cameras.width, "height": clip.cameras.height, "frames": frames}


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
