"""Which source is driven by which clip, and the folders in which other methods provide their frames.

<DIR>/<mode>/<source>__<driver>/<row of the driver's frame, 00001>.png      or <DIR>/<mode>/<source>__<driver>.mp4
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from eval.reenactment.clips import Clip, on_white
from gaussian_tokenizer.captures.frame import load_image
from gaussian_tokenizer.utils.atomic import atomic_folder
from gaussian_tokenizer.utils.hub import one_line
from gaussian_tokenizer.utils.json_files import write_json

MODES = ("self", "cross")
FORMAT = "avatar-pointillist reenactment protocol 1"
CAMERAS = "viewmat: world to camera, meters, OpenCV axes (x right, y down, z forward); K: pixels"


@dataclass(frozen=True, eq=False)
class Pair:
    """A source and its driver, of which every frame is reenacted but those its own avatar is made of."""

    mode: str
    source: Clip
    driver: Clip

    @property
    def name(self) -> str:
        return f"{self.source.subject_id}__{self.driver.subject_id}"

    @property
    def rows(self) -> range:
        """The driver's frames that are reenacted."""
        return range(self.driver.num_references, len(self.driver))

    def path(self, folder: Path) -> Path:
        """The folder of this pair's frames."""
        return folder / self.mode / self.name

    def video(self, folder: Path) -> Path:
        """The video that may take the place of the frames."""
        return folder / self.mode / f"{self.name}.mp4"


def frame_name(row: int) -> str:
    return f"{row:05d}.png"


def make_pairs(clips: Sequence[Clip], mode: str, seed: int) -> list[Pair]:
    """The pairs of "self", "cross" or "both"; ValueError for cross-reenactment of fewer than two subjects."""
    pairs = [Pair("self", clip, clip) for clip in clips] if mode in ("self", "both") else []
    if mode in ("cross", "both"):
        if len(clips) < 2:
            found = f"the dataset has {len(clips)}: add subjects, or use --mode self"
            raise ValueError(f"--mode {mode} needs two subjects, one to drive the other; {found}")
        # One cycle through all subjects: each drives once, and none drives itself.
        order = np.random.default_rng(seed).permutation(len(clips))
        driver_of = dict(zip(order.tolist(), np.roll(order, -1).tolist()))
        pairs += [Pair("cross", clip, clips[driver_of[index]]) for index, clip in enumerate(clips)]
    names = [(pair.mode, pair.name) for pair in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two pairs are called {name[1]!r}; use subject ids without '__'")
    return pairs


def by_mode(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """The pairs of each mode that was run, in order."""
    return {mode: own for mode in MODES if (own := [pair for pair in pairs if pair.mode == mode])}


def export_protocol(folder: Path, pairs: Sequence[Pair], seed: int) -> None:
    """Write what another method needs to be compared, atomically.

    sources/<subject>.png, .npz        the source portrait on white and the head parameters of that frame
    references/<subject>/00001.png ... with several reference frames: the further ones; their rows are in the driver's files
    drivers/<subject>/00001.png, ...   the driving frames on white; flame_param.npz, cameras.json: one row per frame, from 0
    protocol.json                      the pairs, and the names of the frames expected of each
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: not empty; choose another folder for the protocol")
    sources = {pair.source.subject_id: pair.source for pair in pairs}
    drivers = {pair.driver.subject_id: pair.driver for pair in pairs}
    width, height = pairs[0].driver.size
    with atomic_folder(folder) as new:
        (new / "sources").mkdir()
        for name, clip in sources.items():
            Image.fromarray(clip.image(0)).save(new / "sources" / f"{name}.png")
            clip.params.frame(0).save(new / "sources" / f"{name}.npz")
            for row in range(1, clip.num_references):
                (new / "references" / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(clip.image(row)).save(new / "references" / name / frame_name(row))
        for name, clip in tqdm(drivers.items(), desc="writing drivers", unit="subject"):
            own = new / "drivers" / name
            own.mkdir(parents=True)
            for row in range(clip.num_references, len(clip)):
                Image.fromarray(clip.image(row)).save(own / frame_name(row))
            clip.params.save(own / "flame_param.npz")
            cameras = zip(clip.cameras.viewmats.tolist(), clip.cameras.Ks.tolist())
            frames = [{"viewmat": viewmat, "K": K} for viewmat, K in cameras]
            write_json(own / "cameras.json", {"about": CAMERAS, "width": width, "height": height, "frames": frames})
        content = {"format": FORMAT, "seed": seed, "width": width, "height": height, "background": "white"}
        write_json(new / "protocol.json", content | {"pairs": [describe(pair) for pair in pairs]})


def describe(pair: Pair) -> dict:
    """A pair for JSON."""
    return {
        "mode": pair.mode,
        "name": pair.name,
        "source": pair.source.subject_id,
        "source_camera": pair.source.numbers[0],
        "reference_cameras": pair.source.numbers[1 : pair.source.num_references],
        "driver": pair.driver.subject_id,
        "driver_cameras": [pair.driver.numbers[row] for row in pair.rows],
        "frames": [frame_name(row) for row in pair.rows],
    }


def describe_protocol(settings: Mapping[str, Any]) -> dict[str, str]:
    """Every choice that a number depends on; `settings` are the flags of the bench."""
    more = settings["num_references"] - 1
    others = "but for the frames read for its avatar" if more else "from its second frame on"
    further = f"; {more} more of its clip, evenly spaced over cameras and time, are read with it" if more else ""
    return {
        "frames": "as in the dataset, whole images, no mask, on white, 8 bits; frames of compared methods likewise",
        "subjects": "sorted by name" + (f", the first {settings['num_subjects']}" if settings['num_subjects'] else ""),
        "camera": "all, in order of their numbers" if settings['camera'] is None else f"camera {settings['camera']}",
        "source": "the first timestep of the camera with the lowest number, with its tracked shape and static offset"
        + further,
        "self": f"driven by the same clip {others}, in all its cameras, which is also the truth",
        "cross": f"driven by another subject's clip {others}: its expression, joint rotations, translation and "
        "camera on the source's shape; the pairing is a random cycle through all subjects, drawn with the seed",
        "avatar": f"one per source, generated {settings['batch_size']} at a time with seed {settings['seed']}, the most likely of "
        f"{settings['candidates']} point clouds, at most {settings['max_points'] or 'any number of'} points, "
        f"{settings['max_points_per_face']} per face; posed by linear blend skinning",
        "mean": "over all frames of all pairs",
        "intervals": f"95 %, over source subjects: bootstrap of 1,000 draws with seed {settings['seed']}; jackknife for FID",
        "PSNR": "of images on 0..255, all channels together, in dB; infinite for equal images",
        "SSIM": "Gaussian window of 11 pixels, sigma 1.5, mean of three channels",
        "Coverage": "share of the true subject's pixels (alpha above 1/2) that are opaque in the frame; needs images with alpha",
        "LPIPS": "version 0.1, backbone as listed under networks, images on -1..1",
        "FID": "2,048 Inception features of all frames; self: against the true frames; cross: against the source's own frames "
        f"{others}. It falls with the number of frames: compare only equal numbers",
        "CLIP": "cosine of image features; self: with the true frame; cross: with the source portrait",
        "CSIM": "cosine of ArcFace features; self: with the true frame; cross: with the source portrait",
        "AKD": "mean distance of landmarks to those of the driver's frame, in pixels, scaled to images whose longer side is 512",
        "APD": "head rotation against the driver's frame: mean absolute difference of three Euler angles in milliradians, which "
        "matches the magnitude of published values; geodesic: the angle between the two rotations in degrees",
        "AED": "mean absolute difference of expression coefficients to the driver's frame",
        "no face": "a frame without a face, or whose driver's frame has none, is counted and enters no mean of AKD, APD, AED, CSIM",
    }  # fmt: skip


def check_frames(folder: Path, pairs: Sequence[Pair]) -> list[str]:
    """Everything in <folder>/<mode> that differs from what the pairs of this one mode expect, one line each.

    Opens all frames. A line is "missing: ...", "extra: ...", "unreadable: ..." or "wrong size: ...", in this order.
    """
    mode = pairs[0].mode
    relative = (path.relative_to(folder) for path in (folder / mode).rglob("*") if path.is_file())
    extra = {str(path) for path in relative if not any(part.startswith(".") for part in path.parts)}
    problems: dict[str, list[str]] = {kind: [] for kind in ("missing", "extra", "unreadable", "wrong size")}
    for pair in tqdm(pairs, desc=f"checking {folder.name} {mode}", unit="pair", leave=False):
        has_video, (width, height) = pair.video(folder).is_file(), pair.driver.size
        if has_video:  # H.264 needs even sides: the last column or row of an odd side is repeated
            width, height = width + width % 2, height + height % 2
        frames = [pair.path(folder) / frame_name(row) for row in pair.rows]
        for path in [pair.video(folder)] if has_video else frames:
            name = str(path.relative_to(folder))
            if name not in extra:
                problems["missing"].append(name)
                continue
            extra.discard(name)
            try:
                images = read_video(path) if has_video else np.asarray(load_image(path))[None]
            except ValueError as error:
                problems["unreadable"].append(str(error))
                continue
            if has_video and len(images) != len(frames):
                problems["missing"].append(f"{name} has {len(images)} frames, expected {len(frames)}")
            if (size := images[0].shape[1::-1]) != (width, height):
                problems["wrong size"].append(f"{name} is {size}, expected {(width, height)}")
    problems["extra"] = sorted(extra)
    return [f"{kind}: {name}" for kind, names in problems.items() for name in names]


def read_frames(folder: Path, pair: Pair) -> np.ndarray:
    """(N, H, W, 3) uint8, the frames of a pair on white; ValueError that names a frame that cannot be read."""
    if pair.video(folder).is_file():
        width, height = pair.driver.size
        return read_video(pair.video(folder))[:, :height, :width]
    return np.stack([on_white(load_image(pair.path(folder) / frame_name(row))) for row in pair.rows])


def read_video(path: Path) -> np.ndarray:
    """(N, H, W, 3) uint8 of a video; ValueError if it cannot be decoded, ImportError without imageio-ffmpeg."""
    try:
        import imageio_ffmpeg
    except ImportError as error:
        remedy = 'pip install "avatar-pointillist[video]", or provide PNGs'
        raise ImportError(f"{path}: reading videos needs imageio-ffmpeg ({error}): {remedy}") from error
    try:
        reader = imageio_ffmpeg.read_frames(str(path))
        width, height = next(reader)["size"]
        frames = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]
    except (OSError, RuntimeError, ValueError, StopIteration) as error:
        raise ValueError(f"{path} is not a readable video: {one_line(error)[:200]}") from None
    if not frames:
        raise ValueError(f"{path} is not a readable video: it has no frames")
    return np.stack(frames)
