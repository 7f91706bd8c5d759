"""An avatar in steps that can be shown: points as they are generated, its animation, and the files to download."""

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event

import numpy as np
import torch
from PIL import Image

from eval.viewer.exports import folder_bytes
from gaussian_tokenizer.animate import DISTANCE, FRAMES_AT_ONCE, framing, posed_parts
from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.avatars.export import save_video
from gaussian_tokenizer.avatars.motions import synthetic_motion
from gaussian_tokenizer.avatars.moving_page import PageCamera, save_page
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.rendering.cameras import Cameras
from gaussian_tokenizer.rendering.point_plots import draw_points
from gaussian_tokenizer.rendering.splatting import render
from modeling.pipeline import AvatarPipeline
from modeling.pointillist.generation_streamer import PointStreamer

INTERVAL = 0.4  # seconds between two pictures, and at least
BUSY = 10  # times as long as it takes to draw one
POINTS_SIZE, VIDEO_SIZE, NUM_FRAMES, FPS = 300, 320, 48, 16.0
SWING = 45.0  # degrees to either side in the animation
Portrait = tuple[Image.Image, HeadParameters, Cameras]


class Stopped(Exception):
    """The visitor stopped it, or left."""


@dataclass(frozen=True)
class Step:
    """What to show now: a sentence, how far that is (0 to 1, None: not known), and a picture of the points."""

    text: str
    share: float | None = None  # 1: nothing more is done
    picture: Image.Image | None = None
    files: tuple[Path, ...] = ()  # of the finished avatar, the animation first


class Clouds(PointStreamer):
    """The clouds of a batch as they grow, each a list of positions (3,); raises `Stopped` in the loop of `generate`."""

    def __init__(self, tokenizer, count: int, stop: Event) -> None:
        super().__init__(tokenizer)
        self.stop, self.positions = stop, [list[np.ndarray]() for _ in range(count)]
        self.ended = [False] * count
        self.rows = [PointStreamer(tokenizer, partial(_append, own)) for own in self.positions]

    def put(self, value: torch.Tensor) -> None:
        """Token ids of every row: (B, L) of the prompt or (B,) of a step."""
        if self.stop.is_set():
            raise Stopped
        for row, ids in enumerate(value.reshape(len(self.rows), -1)):
            self.rows[row].put(ids[None])
            self.ended[row] |= bool((ids == self.tokenizer.eos_token_id).any())

    def shares(self, heights: np.ndarray) -> list[float]:
        """How far each cloud is: points rise from the neck to the crown, so the share of sorted `heights` below the last one."""
        reached = [float(own[-1][1]) if own else -math.inf for own in self.positions]
        shares = np.searchsorted(heights, reached) / len(heights)
        return [1.0 if ended else float(share) for ended, share in zip(self.ended, shares)]


def make(
    pipeline: AvatarPipeline, portrait: Portrait, folder: Path, stop: Event, candidates: int, **settings
) -> Iterator[Step]:
    """The steps from a portrait to an avatar; the last one has its files, in `folder`. `settings` are those of the pipeline.

    Raises `Stopped` soon after `stop` is set, and what the pipeline raises.
    """
    image, params, camera = portrait
    vertices = pipeline.head.canonical_vertices(params.to(pipeline.device)).cpu().numpy()
    heights, begun = np.sort(vertices[:, 1]), time.perf_counter()
    clouds, pause = Clouds(pipeline.tokenizer, candidates, stop), 0.0
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(
            pipeline, image, params, camera=camera, candidates=candidates, streamer=clouds, progress=False, **settings
        )
        try:
            while not wait([work], max(INTERVAL, pause)).done:
                now = time.perf_counter()
                yield _generating(clouds, heights, vertices, now - begun)
                pause = BUSY * (time.perf_counter() - now)
        except GeneratorExit:  # the page is gone: the loop of `generate` ends with its next token
            stop.set()
            raise
        avatar = work.result()
    assert isinstance(avatar, GaussianAvatar)
    positions = avatar.canonical_points()["positions"].cpu().numpy()
    picture = _side_by_side([draw_points(positions, vertices, azimuth, POINTS_SIZE) for azimuth in (0.0, 45.0)])
    text = f"{len(avatar):,} points in {_duration(time.perf_counter() - begun)}"
    for images in animation(avatar):
        if stop.is_set():
            raise Stopped
        yield Step(f"{text}; drawing the animation", len(images) / NUM_FRAMES, picture)
    yield Step(text, 1.0, picture, write_files(avatar, images, folder))


@torch.inference_mode()
def animation(avatar: GaussianAvatar) -> Iterator[np.ndarray]:
    """Images (T, H, W, 3) uint8 of the avatar as it talks and turns, more and more of them."""
    assert avatar.head is not None
    bound, motion = avatar.bind(), synthetic_motion("talk", avatar.head, NUM_FRAMES)
    azimuths = [SWING * math.sin(2 * math.pi * frame / NUM_FRAMES) for frame in range(NUM_FRAMES)]
    target, extent = framing(bound, motion, (-SWING, 0.0, SWING))
    focal = DISTANCE * VIDEO_SIZE / extent
    cameras = Cameras.orbit(target, DISTANCE, azimuths, 0.0, focal, VIDEO_SIZE, VIDEO_SIZE)
    images: list[np.ndarray] = []
    for posed in posed_parts(bound, motion, "lbs", FRAMES_AT_ONCE):
        seen = cameras[len(images) : len(images) + posed.num_frames]
        drawn = render(posed, seen, background=1.0).image
        images.extend((drawn.clamp(0, 1) * 255 + 0.5).byte().cpu().numpy())
        yield np.stack(images)


def write_files(avatar: GaussianAvatar, images: np.ndarray, folder: Path) -> tuple[Path, ...]:
    """What can be downloaded, the animation first."""
    assert avatar.head is not None
    bound, motion = avatar.bind(), synthetic_motion("talk", avatar.head, NUM_FRAMES)
    target, extent = framing(bound, motion, (0.0,))
    camera = PageCamera(target.tolist(), extent)
    writers: dict[str, Callable[[Path], object]] = {  # one line for each further kind of file
        "talking.gif": lambda path: save_video(path, images, FPS),
        "talking.html": lambda path: save_page(path, posed_parts(bound, motion, "lbs"), camera, "avatar", FPS),
        "avatar.zip": lambda path: path.write_bytes(folder_bytes(avatar, "avatar")),
        "avatar.ply": lambda path: avatar.save_world_ply(path, frame=None),
    }
    for name, write in writers.items():
        write(folder / name)
    return tuple(folder / name for name in writers)


def _append(positions: list[np.ndarray], point: dict) -> None:
    positions.append(point["positions"][0])


def _generating(clouds: Clouds, heights: np.ndarray, vertices: np.ndarray, seconds: float) -> Step:
    shares = clouds.shares(heights)
    share, count = min(shares), max(map(len, clouds.positions))
    pictures = [
        draw_points(np.array(own).reshape(-1, 3), vertices, 20 * math.sin(seconds / 2), POINTS_SIZE)
        for own in clouds.positions
    ]
    if share == 1:
        return Step(f"{count:,} points; choosing the likeliest cloud and coloring it", None, _side_by_side(pictures))
    left = f", about {_duration(seconds * (1 - share) / share)} left" if seconds > 2 and share > 0.03 else ""
    return Step(f"{count:,} points{left}", share, _side_by_side(pictures))


def _side_by_side(pictures: list[Image.Image]) -> Image.Image:
    """In rows of two, or one alone."""
    columns = min(2, len(pictures))
    size = POINTS_SIZE
    sheet = Image.new("RGB", (columns * size, -(-len(pictures) // columns) * size), "white")
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % columns * size, index // columns * size))
    return sheet


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
