"""Posed Gaussians and images to files that other programs open, atomically: splats, PLY sequences, videos."""

import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gaussian_tokenizer.avatars.gaussians import MIN_SCALE, Gaussians
from gaussian_tokenizer.avatars.ply import PlyGaussians, write_gaussian_ply
from gaussian_tokenizer.geometry.rotations import quaternion_multiply
from gaussian_tokenizer.utils.atomic import atomic_file, atomic_folder

MIN_OPACITY = 1e-7  # with a finite logit in float32
SPLAT_FORMATS = {".compressed.ply": "ply_compressed", ".splat": "splat", ".ply": "ply"}
UP = ("y", "minus_y")  # where the crown is: as in the toolkit, or as in most trained scenes
PALETTE_PIXELS = 500_000  # of all frames together, from which the colors of a GIF are chosen
MP4_QUALITY = 18  # x264's constant rate factor: visually almost lossless


def save_splats(
    path: str | os.PathLike, gaussians: Gaussians, frame: int = 0, up: Literal["y", "minus_y"] = "y"
) -> None:
    """Write one frame for viewers, by the suffix: `.ply`, `.splat` or `.compressed.ply`; meters, world space.

    `.splat` (antimatter15's viewer) keeps colors of SH degree 0 in 8 bits; `.compressed.ply` (SuperSplat) has about
    16 bytes a Gaussian and leaves out opacities below 1 / 255. Both reorder the Gaussians and need gsplat. `up` "minus_y"
    rotates by 180 degrees about x, into the axes of COLMAP's scenes (y down, z away from the viewer), which SuperSplat
    assumes. ValueError for another suffix or `up` or a value that is not finite.
    """
    path = Path(path)
    suffix = next((suffix for suffix in SPLAT_FORMATS if path.name.endswith(suffix)), None)
    if suffix is None:
        raise ValueError(f"{path}: unknown kind of file; Gaussians are written as {', '.join(sorted(SPLAT_FORMATS))}")
    stored = _stored(gaussians, frame, up)  # with its checks: one NaN opacity makes gsplat 1.5.3 drop all points
    if suffix == ".ply":
        write_gaussian_ply(path, PlyGaussians(**{name: value.numpy() for name, value in stored.items()}))
        return
    with atomic_file(path) as file:
        file.write(_gsplat_bytes(stored, SPLAT_FORMATS[suffix]))


def save_ply_sequence(
    folder: str | os.PathLike, gaussians: Gaussians | Iterable[Gaussians], up: Literal["y", "minus_y"] = "y"
) -> int:
    """Write `00000.ply`, `00001.ply`, ... into a folder, replacing an existing one; returns the number of frames.

    An iterable gives the motion in parts of any number of frames. `up` as for `save_splats`.
    """
    parts = [gaussians] if isinstance(gaussians, Gaussians) else gaussians
    count = 0
    with atomic_folder(folder) as temporary:
        for part in parts:
            for frame in range(part.num_frames):
                save_splats(temporary / f"{count:05d}.ply", part, frame, up)
                count += 1
        if count == 0:
            raise ValueError(f"{folder}: no frames to write")
    return count


def save_video(path: str | os.PathLike, images: np.ndarray | Tensor, fps: float = 25.0) -> None:
    """Write images (T, H, W, 3), uint8 or floats in 0..1, as `.gif`, `.mp4` or, without a suffix, a folder of PNG.

    A GIF has one palette for all frames and no dithering, so that nothing flickers; its frame time is rounded to
    hundredths of a second. An MP4 is H.264 in yuv420p, odd sizes padded by one pixel. A folder replaces an existing one.
    ValueError for other suffixes or shapes, ImportError without imageio-ffmpeg.
    """
    path = Path(path)
    if path.suffix not in ("", ".gif", ".mp4"):
        raise ValueError(f"{path}: unknown kind of video; give .gif, .mp4, or no suffix for a folder of PNG")
    if not 0 < fps <= 1000:
        raise ValueError(f"{fps} frames per second; expected more than 0 and at most 1000")
    frames = _to_bytes(images)
    if path.suffix == "":
        with atomic_folder(path) as folder:
            for index, frame in enumerate(frames):
                Image.fromarray(frame).save(folder / f"{index:05d}.png")
        return
    with atomic_file(path) as file:  # opened first: a missing folder fails before minutes of encoding
        if path.suffix == ".gif":
            _write_gif(file, frames, fps)
        else:
            file.write(_mp4_bytes(frames, fps))


def _stored(gaussians: Gaussians, frame: int, up: str) -> dict[str, Tensor]:
    """One frame as files keep it, float32 on the CPU; ValueError if anything is not finite or the frame is not there."""
    if up not in UP:
        raise ValueError(f"up is {up!r}, expected {' or '.join(map(repr, UP))}")
    if not -gaussians.num_frames <= frame < gaussians.num_frames:
        raise ValueError(f"frame {frame} asked of Gaussians of {gaussians.num_frames} frames")
    one = gaussians.frames(frame)
    one.check_finite()
    if up == "minus_y":
        one = _upside_down(one)
    # Logits in double precision: in float32 an opacity near 1 has few digits left beside it.
    opacities = one.opacities.detach().double().clamp(MIN_OPACITY, 1 - MIN_OPACITY).logit()
    tensors = {
        "positions": one.positions[0],
        "sh": one.sh,
        "opacities": opacities,
        "scales": one.scales[0].clamp(min=MIN_SCALE).log(),
        "quats": one.quats[0],
    }
    return {name: value.detach().float().cpu() for name, value in tensors.items()}


def _upside_down(gaussians: Gaussians) -> Gaussians:
    """Rotated by 180 degrees about x, so that y and z change sign.

    A real SH function of degree l and order m is odd in z where l + m is odd, and odd in y where m < 0 (sin(m phi)).
    """
    x_axis = gaussians.quats.new_tensor((0, 1, 0, 0)).expand_as(gaussians.quats)
    bands = range(gaussians.sh_degree + 1)
    signs = [(-1) ** (degree + order + (order < 0)) for degree in bands for order in range(-degree, degree + 1)]
    return replace(
        gaussians,
        positions=gaussians.positions * gaussians.positions.new_tensor((1, -1, -1)),
        quats=quaternion_multiply(x_axis, gaussians.quats),
        sh=gaussians.sh * gaussians.sh.new_tensor(signs)[:, None],
    )


def _gsplat_bytes(stored: dict[str, Tensor], kind: str) -> bytes:
    try:
        from gsplat.exporter import export_splats
    except ImportError as error:
        raise ImportError(
            f"writing .splat and .compressed.ply needs gsplat ({error}): "
            'pip install "avatar-pointillist[render]", or write a plain .ply'
        ) from error
    means, scales, quats, opacities = (stored[name] for name in ("positions", "scales", "quats", "opacities"))
    quats = torch.nn.functional.normalize(quats, dim=-1)
    content = export_splats(means, scales, quats, opacities, stored["sh"][:, :1], stored["sh"][:, 1:], format=kind)
    if kind == "ply_compressed" and stored["sh"].shape[1] == 1:
        # gsplat announces an element `sh` without properties, at which SuperSplat's and Spark's readers fail.
        content = re.sub(rb"element sh \d+\nend_header\n", b"end_header\n", content, count=1)
    return content


def _to_bytes(images: np.ndarray | Tensor) -> np.ndarray:
    """(T, H, W, 3) uint8."""
    array = images.detach().cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    if array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape:
        raise ValueError(f"a video is images (T, H, W, 3), at least one; found {array.shape}")
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind != "f":
        raise ValueError(f"images are {array.dtype}, expected uint8 or floats in 0..1")
    if not np.isfinite(array).all():
        frame = np.argwhere(~np.isfinite(array))[0][0]
        raise ValueError(f"image {frame} holds a value that is not finite")
    return (np.clip(array, 0, 1) * 255 + 0.5).astype(np.uint8)


def _write_gif(file: BinaryIO, frames: np.ndarray, fps: float) -> None:
    palette = Image.new("P", (1, 1))
    palette.putpalette(_common_palette(frames))
    indexed = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    hundredths = max(2, round(100 / fps))  # viewers slow down what is shorter
    indexed[0].save(
        file, format="GIF", save_all=True, append_images=indexed[1:], duration=10 * hundredths, loop=0, optimize=False
    )


def _common_palette(frames: np.ndarray) -> bytes:
    """At most 256 colors for all frames: their own if they have no more, else cuts at the median of their boxes."""
    packed = frames.reshape(-1, 3) @ np.array((65536, 256, 1))
    colors, counts = np.unique(packed, return_counts=True)
    if len(colors) > 256:
        # Drawn, the same every time: an even stride might meet the same columns again and again.
        sample = np.random.default_rng(0).choice(packed, min(len(packed), PALETTE_PIXELS))
        pixels = np.stack((sample >> 16, sample >> 8 & 255, sample & 255), -1).astype(np.uint8)
        cut = Image.fromarray(pixels[None]).quantize(255, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        cut_colors = np.array(cut.getpalette()).reshape(-1, 3)[:255] @ np.array((65536, 256, 1))
        # The exact background, not the mean of its box, or the image would stand out from a white page.
        colors = np.append(cut_colors, colors[counts.argmax()])
    return np.stack((colors >> 16, colors >> 8 & 255, colors & 255), -1).astype(np.uint8).tobytes()


def _mp4_bytes(frames: np.ndarray, fps: float) -> bytes:
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise ImportError(
            f'writing .mp4 needs imageio-ffmpeg ({error}): pip install "avatar-pointillist[video]", or write a .gif'
        ) from error
    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    # ffmpeg writes to a file name only.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        writer = imageio_ffmpeg.write_frames(
            str(path),
            (frames.shape[2], frames.shape[1]),
            fps=fps,
            codec="libx264",
            pix_fmt_out="yuv420p",
            quality=None,
            macro_block_size=1,
            output_params=["-crf", str(MP4_QUALITY), "-movflags", "+faststart", "-fflags", "+bitexact"],
        )
        try:
            writer.send(None)
            for frame in frames:
                writer.send(np.ascontiguousarray(frame))
            writer.close()
        except OSError as error:  # holds all of ffmpeg's log, whose last line is the reason
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise OSError(f"ffmpeg could not write the video: {lines[-1] if lines else error}") from error
        return path.read_bytes()
