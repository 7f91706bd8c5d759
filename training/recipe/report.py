"""Metrics and images of the demo's results.

Images are those of every frame of a held-out subject, on white.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.avatars.export import save_video
from gaussian_tokenizer.avatars.motions import expression_frames, synthetic_motion
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.rendering.cameras import Cameras, portrait_cameras
from gaussian_tokenizer.rendering.image_metrics import psnr, ssim
from gaussian_tokenizer.rendering.splatting import render
from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer
from modeling import PointillistForCausalLM
from training.common.rows import AvatarRows
from training.decoder.subjects import SubjectRows, cameras_of, motion_of, on_background
from training.pretraining.metrics import slot_metrics, slot_sums
from training.pretraining.windows import EvaluationWindows, collate_windows

VIEWS = (-35.0, 0.0, 35.0)  # degrees to the subject's left
GIF_SUBJECTS = 4


def judge(tokenizer: GaussianTokenizer, ids: np.ndarray) -> tuple[dict, int]:
    """The points of a generated sequence, and how many of its tokens differ from those of the tokenizer for these points."""
    points = tokenizer.decode(ids, errors="truncate")
    invalid = int(points.pop("dropped"))
    if len(points["faces"]):
        again = tokenizer(points)["input_ids"].astype(np.int64)[: 1 + 4 * len(points["faces"])]
        invalid += int((ids[: len(again)] != again).sum())
    return points, invalid


def chamfer(a: np.ndarray, b: np.ndarray) -> float:
    """Mean distance in meters to the nearest point of the other cloud, averaged over both directions."""
    if not len(a) or not len(b):
        return float("inf")
    distances = torch.cdist(torch.from_numpy(a).double(), torch.from_numpy(b).double())
    return float(distances.min(1).values.mean() + distances.min(0).values.mean()) / 2


def compare_points(points: Mapping, invalid: int, truth: Sequence[Mapping], row: int) -> dict[str, float | bool]:
    """Entries of the report: numbers of points, invalid tokens, chamfer distances to the true points of all subjects."""
    distances = np.array([chamfer(points["positions"], other["positions"]) for other in truth])
    return {
        "num_points": len(points["faces"]),
        "num_points_true": len(truth[row]["faces"]),
        "invalid_tokens": invalid,
        "chamfer_own": float(distances[row]),
        "chamfer_others": float(np.delete(distances, row).mean()),
        "closest_is_own": bool(distances.argmin() == row),
    }


@torch.no_grad()
def nll_of_another(model: PointillistForCausalLM, rows: AvatarRows) -> float:
    """Held-out NLL with the condition of the next subject instead of the true one: it shows the value of the condition."""
    grouped = model.config.level == "point"
    windows = EvaluationWindows(rows, model.config.window_tokens, grouped=grouped)
    sums = torch.zeros(3, 4, dtype=torch.double)
    for i, (row, _, _) in enumerate(windows.items):
        item = windows[i] | rows.condition((row + 1) % len(rows), None)
        batch = collate_windows([item], model.config.pad_token_id, grouped)
        labels = batch.pop("labels")
        sums += slot_sums(model(**batch).logits, labels, model.config).sum(0)
    return slot_metrics(sums)["nll"]


def true_frames(subjects: SubjectRows, row: int) -> dict[str, torch.Tensor]:
    """All frames of a subject as a batch of one: images, cameras, head parameters."""
    item = subjects.targets(list(subjects.frame_rows(row))) | {"shape": subjects.subject(row, None)["shape"]}
    return {name: torch.from_numpy(value)[None] for name, value in item.items()}


@torch.no_grad()
def image_metrics(avatar: GaussianAvatar, frames: Mapping[str, torch.Tensor]) -> tuple[float, float]:
    """PSNR (dB) and SSIM of an avatar against a subject's true frames, on white."""
    truth = on_background(frames["images"][0], torch.ones(frames["images"].shape[1]))
    drawn = render(avatar.posed(motion_of(frames, 0)), cameras_of(frames, 0), background=1.0).image
    return float(psnr(drawn, truth).mean()), float(ssim(drawn, truth).mean())


def draw_avatars(path: Path, rows: Sequence[tuple[str, Image.Image, GaussianAvatar]], size: int = 160) -> None:
    """One row a subject: portrait, three views at rest, three expressions from the front."""
    columns = ["portrait", *(f"{angle:+.0f} degrees" for angle in VIEWS)]
    lines = []
    for _, portrait, avatar in rows:
        head = avatar.head
        assert head is not None
        views = images_of(avatar, None, portrait_cameras(head, size, VIEWS))
        faces = list(expression_frames(head).items())[1:4]
        shown = [images_of(avatar, params, portrait_cameras(head, size))[0] for _, params in faces]
        columns = columns[:4] + [name.replace("_", " ") for name, _ in faces]
        lines.append(np.concatenate([on_white(portrait, size), *views, *shown], axis=1))
    labels = Image.new("RGB", (lines[0].shape[1], 16), "white")
    for number, name in enumerate(columns):
        ImageDraw.Draw(labels).text((number * size + 4, 2), name, fill="black")
    Image.fromarray(np.concatenate([np.asarray(labels), *lines])).save(path)


def draw_motion(
    path: Path, rows: Sequence[tuple[str, Image.Image, GaussianAvatar]], size: int = 160, num_frames: int = 48
) -> None:
    """A GIF of the first subjects, each below its portrait, talking while they look around."""
    panels = []
    for _, portrait, avatar in rows[:GIF_SUBJECTS]:
        head = avatar.head
        assert head is not None
        talk, look = (synthetic_motion(name, head, num_frames) for name in ("talk", "look_around"))
        motion = replace(talk, neck_pose=look.neck_pose, eyes_pose=look.eyes_pose, rotation=look.rotation)
        still = on_white(portrait, size)
        moving = images_of(avatar, motion, portrait_cameras(head, size))
        panels.append(np.stack([np.concatenate((still, frame)) for frame in moving]))
    save_video(path, np.concatenate(panels, axis=2), fps=20)


@torch.no_grad()
def images_of(avatar: GaussianAvatar, motion: HeadParameters | None, cameras: Cameras) -> np.ndarray:
    """(C, H, W, 3) uint8 on white, at rest or at the timesteps of a motion."""
    gaussians = avatar.canonical_gaussians() if motion is None else avatar.posed(motion)
    image = render(gaussians, cameras, background=1.0).image
    return (image.clamp(0, 1) * 255 + 0.5).to(torch.uint8).cpu().numpy()


def on_white(portrait: Image.Image, size: int) -> np.ndarray:
    """(size, size, 3) uint8."""
    image = portrait.convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image).convert("RGB"))
