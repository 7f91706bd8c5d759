"""The networks behind the metrics: their options, each of which is a command-line flag, and one call that opens them.

    NetworkOptions -> open_networks -> Networks: each field a network, or `Missing` with the reason and the remedy

| field | network | package | returns |
|---|---|---|---|
| lpips | AlexNet or VGG16 with LPIPS's linear heads | lpips | (N,) distances of two stacks of images |
| inception | InceptionV3 of FID | torch-fidelity | (N, 2048) features |
| face | FaceLandmarker | mediapipe | `FaceReading`: landmarks, rotations, expressions |
| clip | CLIP's image encoder | transformers | (N, D) features |
| arcface | ArcFace | onnxruntime | (N, 512) features of images and their landmarks |

Images are (N, H, W, 3) uint8, results are NumPy arrays. `about` of each says what its numbers are computed with. Nothing is
downloaded, and packages are imported only where they are used.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from eval.networks.faces import ArcFace, FaceLandmarks, open_arcface, open_face
from eval.networks.images import ClipImageEncoder, Inception, Lpips, open_clip, open_inception, open_lpips
from eval.networks.weights import Missing


def _option(default: str | None, about: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": about, **more})


@dataclass(frozen=True)
class NetworkOptions:
    """Which networks, and where their weights are."""

    lpips_net: str = _option("alex", "backbone of LPIPS (default: alex)", choices=("alex", "vgg"))
    lpips_weights: str | None = _option(
        None, "torchvision's weights of that backbone: alexnet-owt-7be5be79.pth or vgg16-397923af.pth"
    )
    inception_weights: str | None = _option(None, "weights of FID's network: weights-inception-2015-12-05-6726825d.pth")
    landmark_weights: str | None = _option(None, "MediaPipe's face_landmarker.task, for AKD, APD, AED and CSIM")
    clip_model: str | None = _option(None, "folder of a transformers CLIP model, or the Hub id of a cached one")
    arcface_weights: str | None = _option(None, "an ArcFace network as ONNX: w600k_r50.onnx")
    device: str = _option("cpu", "device, e.g. cpu or cuda (default: cpu)")


@dataclass(frozen=True)
class Networks:
    """The networks that are available on this machine."""

    lpips: Lpips | Missing
    inception: Inception | Missing
    face: FaceLandmarks | Missing
    clip: ClipImageEncoder | Missing
    arcface: ArcFace | Missing


OPENERS: dict[str, Callable[[NetworkOptions], Any]] = {
    "lpips": lambda options: open_lpips(options.lpips_net, options.lpips_weights, options.device),
    "inception": lambda options: open_inception(options.inception_weights, options.device),
    "face": lambda options: open_face(options.landmark_weights),
    "clip": lambda options: open_clip(options.clip_model, options.device),
    "arcface": lambda options: open_arcface(options.arcface_weights, options.landmark_weights, options.device),
}


def open_networks(options: NetworkOptions) -> Networks:
    """Open every network whose package is installed and whose weights are given.

    Raises:
        FileNotFoundError: weights that were given do not exist.
        ValueError: they belong to another network; names the file, what was found and what was expected.
    """
    return Networks(**{name: opener(options) for name, opener in OPENERS.items()})


def add_network_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each field of `NetworkOptions`."""
    group = parser.add_argument_group("networks of the metrics")
    for option in fields(NetworkOptions):
        group.add_argument(f"--{option.name}", default=option.default, **option.metadata)


def options_from(flags: argparse.Namespace) -> NetworkOptions:
    """The options in the flags that `add_network_flags` added."""
    return NetworkOptions(**{option.name: getattr(flags, option.name) for option in fields(NetworkOptions)})
