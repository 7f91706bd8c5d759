"""What a run looks like: `grid.png`, a frame of every pair by every method, and a video of every pair side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from eval.reenactment.methods import Method
from eval.reenactment.protocol import Pair
from gaussian_tokenizer.avatars.export import save_video
from gaussian_tokenizer.utils.atomic import atomic_file

GRID_PAIRS = 8  # of each mode
PANEL = 192  # pixels of a small image, at most those of the frames
LABEL_HEIGHT, GAP, BETWEEN_MODES = 22, 4, 40
LABEL, PAPER = (90, 96, 105), (255, 255, 255)
FPS, SECONDS = 25, 4  # a clip of fewer frames is slowed down until it lasts so long


def draw_grid(path: Path, pairs: Sequence[Pair], methods: Sequence[Method]) -> None:
    """Write the grid: a row a pair, at the middle of its clip; columns source, driver, methods; the modes beside each other."""
    modes = list(dict.fromkeys(pair.mode for pair in pairs))
    blocks = []
    for mode in modes:
        own = [pair for pair in pairs if pair.mode == mode]
        present = [method for method in methods if mode not in method.absent]
        strips = []
        for pair in own[:GRID_PAIRS]:
            middle = len(pair.rows) // 2
            frames = {method.name: method.frames(pair)[middle] for method in present}
            strips.append(side_by_side(pair, pair.rows[middle], frames, "truth" not in frames))
        note = f" (the first {GRID_PAIRS} of {len(own)})" if len(own) > GRID_PAIRS else ""
        blocks.append(np.concatenate([_title(f"{mode}-reenactment{note}", strips[0].shape[1]), *strips]))
    blocks = [np.pad(block, ((0, 0), (0, BETWEEN_MODES), (0, 0)), constant_values=255) for block in blocks]
    with atomic_file(path) as file:
        Image.fromarray(np.concatenate(blocks, 1)).save(file, format="PNG")


def save_pair_video(path: Path, pair: Pair, methods: Sequence[Method]) -> Path:
    """Write the pair's video beside its name, `.mp4` or, where imageio-ffmpeg is missing, `.gif`; returns which."""
    made = {method.name: method.frames(pair) for method in methods if pair.mode not in method.absent}
    strips = [
        side_by_side(pair, row, {name: frames[index] for name, frames in made.items()}, "truth" not in made)
        for index, row in enumerate(pair.rows)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    fps = min(FPS, max(1.0, len(strips) / SECONDS))
    try:
        save_video(path.with_suffix(".mp4"), np.stack(strips), fps)
        return path.with_suffix(".mp4")
    except ImportError:
        save_video(path.with_suffix(".gif"), np.stack(strips), fps)
        return path.with_suffix(".gif")


def side_by_side(pair: Pair, row: int, frames: Mapping[str, np.ndarray], with_driver: bool) -> np.ndarray:
    """(h, w, 3) uint8: source, driver (in self-reenactment it is the truth) and the methods' frames with their names."""
    panels = {"source": pair.source.image(0)}
    panels |= {"driver": pair.driver.image(row)} if with_driver else {}
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


def _title(text: str, width: int) -> np.ndarray:
    panel = Image.new("RGB", (width, LABEL_HEIGHT + 6), PAPER)
    _write(panel, text, width, 16)
    return np.asarray(panel)


def _write(panel: Image.Image, text: str, width: int, size: int) -> None:
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default(size)
    while draw.textlength(text, font) > width and len(text) > 2:
        text = text[:-2] + "…"
    draw.text((2, 3), text, LABEL, font)
