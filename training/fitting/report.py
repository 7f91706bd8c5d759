"""The quality of a fitted avatar: `fit_report.json` and `fit.png`.

Held-out images are those of a held-out camera (`val`) and of held-out timesteps (`test`, with the tracked expression and pose).
The avatar is also tokenized and decoded again, its other attributes kept, to measure what the tokenizer's 1,024 levels cost.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gaussian_tokenizer.avatars.anchoring import points_per_face
from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.rendering.image_metrics import psnr, ssim
from gaussian_tokenizer.rendering.splatting import render
from gaussian_tokenizer.tokenizer.point_codec import PointCodec
from gaussian_tokenizer.utils.atomic import atomic_file
from gaussian_tokenizer.utils.versions import installed_versions
from training.fitting.images import evenly_spread
from training.fitting.optimization import Fit
from training.fitting.state import FitState

logger = logging.getLogger(__name__)

REPORT_NAME, IMAGE_NAME = "fit_report.json", "fit.png"
N_BINS = 1024
MARGIN = 0.05  # of the tokenizer's box around the avatar, as in build_corpus
PACKAGES = ("avatar-pointillist", "torch", "numpy", "gsplat")
SHOWN = 3  # images of each kind
ERROR_GAIN = 4  # factor by which errors are amplified in the image


def fit_report(fit: Fit, state: FitState, avatar: GaussianAvatar, max_images: int) -> dict[str, Any]:
    """The content of `fit_report.json`; metrics of a split without images are None."""
    avatar, splits = avatar.to(fit.head.device), fit.tracking.splits
    judged: list[int] = []
    metrics: dict[str, Any] = {}
    for name, split in (("", "val"), ("_timesteps", "test"), ("_train", "train")):
        indices = evenly_spread(fit.tracking, splits[split], max_images)
        metrics[f"psnr{name}"], metrics[f"ssim{name}"] = image_metrics(fit, avatar, indices)
        judged = judged or indices
    metrics["psnr_tokenized"], _ = image_metrics(fit, tokenized(avatar), judged)
    first = fit.tracking.frames[fit.train[0]]
    return {
        "subject_id": fit.tracking.subject_id,
        **metrics,
        "n_bins": N_BINS,
        "num_points": len(avatar),
        "points_per_face": face_stats(avatar.faces, fit.head.n_faces),
        "iterations": state.iteration,
        "scene_extent": fit.extent,
        "num_images": {split: len(indices) for split, indices in splits.items()},
        "image_size": [first.width, first.height],
        "head": {"name": fit.head.name, "hash": fit.head.hash, "n_faces": fit.head.n_faces},
        "device": torch.cuda.get_device_name(fit.head.device) if fit.head.device.type == "cuda" else "cpu",
        "versions": installed_versions(PACKAGES),
        "seconds": {name: round(value, 1) for name, value in state.seconds.items()},
    }


def face_stats(faces: Tensor, n_faces: int) -> dict[str, Any]:
    """Minimum, median and maximum over the occupied faces, share of empty faces, histogram of points on a face."""
    histogram = points_per_face(faces.cpu().numpy(), n_faces)
    occupied = np.repeat(np.arange(len(histogram)), histogram)[histogram[0] :]
    return {
        "min": int(occupied.min()),
        "median": float(np.median(occupied)),
        "max": int(occupied.max()),
        "share_empty": 1 - len(occupied) / n_faces,
        "histogram": histogram.tolist(),
    }


@torch.no_grad()
def image_metrics(fit: Fit, avatar: GaussianAvatar, indices: Sequence[int]) -> tuple[float | None, float | None]:
    """Mean PSNR (dB) and SSIM of rendered images against the true ones; None without images."""
    values = []
    for index in indices:
        image, truth = draw(fit, avatar, index), fit.images.truth(index)
        values.append(torch.cat((psnr(image, truth), ssim(image, truth))))
    if not values:
        return None, None
    mean_psnr, mean_ssim = torch.stack(values).double().mean(0).tolist()
    return mean_psnr, mean_ssim


@torch.no_grad()
def draw(fit: Fit, avatar: GaussianAvatar, index: int) -> Tensor:
    """(1, H, W, 3) the avatar at the timestep and from the camera of an image."""
    assert avatar.params is not None
    posed = avatar.posed(avatar.params.frame(fit.images.row(index)), "face_frames")
    return render(posed, fit.images.camera(index), fit.settings.background).image.clamp(0, 1)


def tokenized(avatar: GaussianAvatar) -> GaussianAvatar:
    """The avatar with positions quantized to `N_BINS` levels per axis."""
    assert avatar.head is not None
    codec = PointCodec(n_bins=N_BINS, n_faces=avatar.head.n_faces)
    codec.fit(avatar, MARGIN)
    encoded = codec.encode(avatar, return_order=True)
    order = torch.as_tensor(encoded.order, device=avatar.faces.device)
    points = GaussianAvatar.from_points(codec.decode(encoded.ids), avatar.params, avatar.head)
    return replace(avatar.select(order), positions=points.positions)


def write_report(fit: Fit, avatar: GaussianAvatar, report: dict[str, Any], folder: Path) -> None:
    """Write `fit_report.json`, and `fit.png` if matplotlib is installed, into a folder."""
    draw_fit(fit, avatar, report, folder / IMAGE_NAME)
    with atomic_file(folder / REPORT_NAME) as file:
        file.write((json.dumps(report, indent=2) + "\n").encode())


def draw_fit(fit: Fit, avatar: GaussianAvatar, report: dict[str, Any], path: Path) -> None:
    """Draw truth, rendering and error of some images of each kind, and the histogram of points on faces."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning('fit.png needs matplotlib: pip install "avatar-pointillist[demo]"')
        return
    avatar = avatar.to(fit.head.device)
    titles, columns = [], []
    for split, title in (("val", "held-out camera"), ("test", "held-out timestep"), ("train", "training")):
        for index in evenly_spread(fit.tracking, fit.tracking.splits[split], SHOWN):
            truth, drawn = (image[0].cpu().numpy() for image in (fit.images.truth(index), draw(fit, avatar, index)))
            error = np.clip(1 - ERROR_GAIN * np.abs(drawn - truth).mean(-1, keepdims=True), 0, 1).repeat(3, -1)
            titles.append(title)
            columns.append(np.concatenate((truth, drawn, error)))
    width = columns[0].shape[1]
    height = columns[0].shape[0] / width / 3
    figure = Figure(figsize=(1.3 * len(columns) + 0.3, 3.9 * height + 2.2), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=(3.9 * height, 1.7))
    upper.imshow(np.concatenate(columns, 1), interpolation="nearest")
    upper.set_xticks([width * (column + 0.5) for column in range(len(columns))], titles)
    upper.set_yticks([width * height * (row + 0.5) for row in range(3)], ["truth", "fit", f"error x {ERROR_GAIN}"])
    upper.tick_params(length=0, labelsize=7, top=False, labeltop=True, bottom=False, labelbottom=False)
    upper.spines[:].set_visible(False)
    draw_histogram(lower, report)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None})


def draw_histogram(axes: Any, report: dict[str, Any]) -> None:
    """Histogram of points on a face, with the metrics of the report as its title."""
    counts = np.asarray(report["points_per_face"]["histogram"])
    axes.bar(np.arange(len(counts)), counts, color=["#b0b0b0"] + ["#3b6ea5"] * (len(counts) - 1))
    named = (("held-out camera", "psnr"), ("held-out timesteps", "psnr_timesteps"), ("as tokens", "psnr_tokenized"))
    values = [f"{title} {report[key]:.2f} dB" for title, key in named if report[key] is not None]
    axes.set_title(f"{report['subject_id']}: {report['num_points']:,} points; " + ", ".join(values), fontsize=8)
    axes.set_xlabel("points on a face", fontsize=8)
    axes.set_ylabel("faces", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
