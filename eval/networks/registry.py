"""The networks behind the metrics: their options, each of which is a command-line flag, and one call that opens them.

Nothing is downloaded, and packages are imported only where they are used.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from eval.networks.faces import ArcFace, FaceLandmarks, open_arcface, open_face
from eval.networks.images import ClipImageEncoder, Inception, Lpips, open_clip, open_inception, open_lpips
from eval.networks.weights import Missing
from gaussian_tokenizer.utils.options import add_options, option


@dataclass(frozen=True)
class NetworkOptions:
    """Which networks, and where their weights are."""

    lpips_net: str = option("alex", "backbone of LPIPS (default: alex)", choices=("alex", "vgg"))
    lpips_weights: str | None = option(None, "alexnet-owt-7be5be79.pth or vgg16-397923af.pth by torchvision", type=str)
    inception_weights: str | None = option(None, "FID's weights-inception-2015-12-05-6726825d.pth", type=str)
    landmark_weights: str | None = option(
        None, "MediaPipe's face_landmarker.task, for AKD, APD, AED and CSIM", type=str
    )
    clip_model: str | None = option(
        None, "a CLIP model of transformers: a folder, or the Hub id of a cached one", type=str
    )
    arcface_weights: str | None = option(None, "an ArcFace network as ONNX: w600k_r50.onnx", type=str)
    device: str = option("cpu", "device, e.g. cpu or cuda (default: cpu)")


@dataclass(frozen=True)
class Networks:
    """Networks from images (N, H, W, 3) uint8 to NumPy arrays; `about` of each says what its numbers are computed with."""

    lpips: Lpips | Missing  # (N,) distances of two stacks of images
    inception: Inception | Missing  # (N, 2048) features
    face: FaceLandmarks | Missing  # `FaceReading`: landmarks, rotations, expressions
    clip: ClipImageEncoder | Missing  # (N, D) features
    arcface: ArcFace | Missing  # (N, 512) features of images and their landmarks


OPENERS: dict[str, Callable[[NetworkOptions], Any]] = {
    "lpips": lambda options: open_lpips(options.lpips_net, options.lpips_weights, options.device),
    "inception": lambda options: open_inception(options.inception_weights, options.device),
    "face": lambda options: open_face(options.landmark_weights),
    "clip": lambda options: open_clip(options.clip_model, options.device),
    "arcface": lambda options: open_arcface(options.arcface_weights, options.landmark_weights, options.device),
}


def open_networks(options: NetworkOptions) -> Networks:
    """Open what is installed and given; FileNotFoundError for a file that does not exist, ValueError for another network's."""
    return Networks(**{name: opener(options) for name, opener in OPENERS.items()})


def add_network_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each field of `NetworkOptions`."""
    add_options(parser.add_argument_group("networks of the metrics"), NetworkOptions)
