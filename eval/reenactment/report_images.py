"""The images of a run: `grid.png`, a frame of every pair by every method, and a video of every pair, side by side."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from eval.reenactment.methods import Method
from eval.reenactment.protocol import Pair, by_mode
from gaussian_tokenizer.avatars.export import save_video
from gaussian_tokenizer.utils.atomic import atomic_file

GRID_PAIRS = 8  # of each mode
PANEL = 192  # maximum height of an image, in pixels
LABEL_HEIGHT, TITLE_HEIGHT, GAP, BETWEEN_MODES = 22, 28, 4, 40
LABEL, PAPER = (90, 96, 105), (255, 255, 255)
FPS, SECONDS = 25, 4  # clips with fewer frames are slowed down to this length


def draw_grid(path: Path, pairs: Sequence[Pair], methods: Sequence[Method]) -> None:
    """A row per pair, at the middle of its clip; columns source, driver, methods; one block per mode, side by side."""
    blocks = []
    for mode, own in by_mode(pairs).items():
        strips = []
        for pair in own[:GRID_PAIRS]:
            middle = len(pair.rows) // 2
            frames = {method.name: method.frames(pair)[middle] for method in methods if mode not in method.absent}
            strips.append(side_by_side(pair, pair.rows[middle], frames))
        note = f" (the first {GRID_PAIRS} of {len(own)})" if len(own) > GRID_PAIRS else ""
        title = Image.new("RGB", (strips[0].shape[1], TITLE_HEIGHT), PAPER)
        _write(title, f"{mode}-reenactment{note}", title.width, 16)
        block = np.concatenate([np.asarray(title), *strips])
        blocks.append(np.pad(block, ((0, 0), (0, BETWEEN_MODES), (0, 0)), constant_values=255))
    with atomic_file(path) as file:
        Image.fromarray(np.concatenate(blocks, 1)).save(file, format="PNG")


def save_pair_video(path: Path, pair: Pair, methods: Sequence[Method]) -> Path:
    """Write the pair's video to `path` plus `.mp4`, or `.gif` without imageio-ffmpeg; returns the name."""
    made = {method.name: method.frames(pair) for method in methods if pair.mode not in method.absent}
    strips = [
        side_by_side(pair, row, {name: frames[index] for name, frames in made.items()})
        for index, row in enumerate(pair.rows)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path = path.with_name(path.name + (".mp4" if find_spec("imageio_ffmpeg") else ".gif"))
    save_video(path, np.stack(strips), min(FPS, max(1.0, len(strips) / SECONDS)))
    return path


def side_by_side(pair: Pair, row: int, frames: Mapping[str, np.ndarray]) -> np.ndarray:
    """(h, w, 3) uint8: labeled frames of source, driver (the truth in self-reenactment) and methods."""
    panels = {"source": pair.source.image(0)}
    panels |= {} if "truth" in frames else {"driver": pair.driver.image(row)}
    panels |= {("truth = driver" if name == "truth" else name): frame for name, frame in frames.items()}
    return np.concatenate([_panel(frame, name) for name, frame in panels.items()], 1)


def _panel(frame: np.ndarray, label: str) -> np.ndarray:
    image = Image.fromarray(frame)
    if image.height > PANEL:
        image = image.resize((round(image.width * PANEL / image.height), PANEL), Image.Resampling.LANCZOS)
    panel = Image.new("RGB", (image.width + GAP, image.height + LABEL_HEIGHT), PAPER)
    panel.paste(image, (0, LABEL_HEIGHT))
    _write(panel, label, image.width, 12)
    return np.asarray(panel)


def _write(panel: Image.Image, text: str, width: int, size: int) -> None:
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default(size)
    while draw.textlength(text, font) > width and len(text) > 2:
        text = text[:-2] + "…"
    draw.text((2, 3), text, LABEL, font)
