"""Arguments of fitting avatars.

Defaults are those of GaussianAvatars (Qian et al. 2024, section 4 and published settings) with AvatarPointillist's constraint.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from training.common.parser import option
from training.fitting.density_control import FaceLimits

# Iterations and intervals, which `shorten` divides.
TIMES = (
    "iterations", "sh_degree_interval", "full_resolution_from", "densify_from", "densify_until", "densify_interval",
    "opacity_reset_interval", "prune_large_from",
)  # fmt: skip


@dataclass
class FitArguments:
    """What is fitted, and where."""

    data: str = option("tracked subject, or folder of such: VHAP exports, GaussianAvatars, Pixel3DMM")
    head: str = option("procedural:600, a .safetensors, a FLAME .pkl, an ICT-FaceKit folder")
    output_dir: str = option("folder for the avatars: one folder per subject, as build_corpus reads them")
    retry_failed: bool = option("retry subjects that failed before", False)
    save_every: int = option("iterations between checkpoints of a subject", 10_000)
    max_eval_images: int = option("held-out images of each kind for the report, evenly spaced", 64)
    max_result_images: int | None = option("images beside the avatar, evenly spaced; 0: none; default: all", None)
    image_cache: int = option("MB of decoded images that a process keeps in memory", 4096)
    disable_tqdm: bool = option("no progress bars", False)
    device: str = option("auto (a GPU if there is one), cpu or cuda", "auto")

    def __post_init__(self) -> None:
        _check(self, 1, math.inf, "save_every", "max_eval_images")
        _check(self, 0, math.inf, "image_cache")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"--device is {self.device!r}, expected auto, cpu or cuda")


@dataclass
class FitSettings:
    """How a subject is fitted. Learning rates are Adam's; lengths relative to a face are in units of its size."""

    iterations: int = option("steps of the optimizer", 600_000)
    shorten: float = option("divide all iterations and intervals by this: 20 makes 30,000 of 600,000", 1.0)
    images_per_step: int = option("images rendered in a step", 1)
    start_downscale: int = option("the first images are reduced to 1/n of their side, which doubles in steps", 1)
    full_resolution_from: int = option("iteration from which images have their full size", 0)
    background: float = option("gray level behind transparent images: 1 is white", 1.0)
    sh_degree: int = option("degree of the colors' spherical harmonics, 0 to 3", 3)
    sh_degree_interval: int = option("iterations until the next degree is optimized too", 1000)
    init_opacity: float = option("initial opacity; there is one Gaussian a face at first", 0.1)

    lambda_dssim: float = option("weight of 1 - SSIM in the loss; L1 has the rest", 0.2)
    position_weight: float = option("weight of the loss on distance from the face", 0.01)
    position_threshold: float = option("distance without that loss, in face sizes", 1.0)
    scale_weight: float = option("weight of the loss on scale", 1.0)
    scale_threshold: float = option("scale without that loss, in face sizes", 0.6)

    position_lr: float = option("initial learning rate of positions, times the scene's extent", 0.005)
    position_lr_final: float = option("final learning rate of positions; it decays exponentially", 0.00005)
    color_lr: float = option("learning rate of the constant color", 0.0025)
    sh_lr: float = option("learning rate of the view-dependent color", 0.000125)
    opacity_lr: float = option("learning rate of opacities (logits)", 0.05)
    scale_lr: float = option("learning rate of scales (logarithms)", 0.017)
    rotation_lr: float = option("learning rate of rotations (quaternions)", 0.001)

    finetune_head: bool = option("optimize the tracked head parameters too", True)
    expr_lr: float = option("learning rate of expressions", 1e-3)
    translation_lr: float = option("learning rate of translations", 1e-6)
    pose_lr: float = option("learning rate of the rotations of head, neck, jaw and eyes", 1e-5)

    densify_from: int = option("iteration after which density control begins", 10_000)
    densify_until: int = option("iteration at which density control ends", 600_000)
    densify_interval: int = option("iterations between two density controls", 2000)
    densify_grad_threshold: float = option("clone or split at this mean screen-space gradient", 2e-4)
    percent_dense: float = option("clone Gaussians up to this share of the extent, split larger ones", 0.01)
    min_opacity: float = option("prune Gaussians below this opacity", 0.005)
    prune_large_from: int = option("iteration after which large Gaussians are pruned; 0: never", 60_000)
    max_scale: float = option("prune Gaussians larger than this share of the extent", 0.1)
    max_radius: float = option("prune Gaussians larger than this on the screen, in pixels", 20.0)
    opacity_reset_interval: int = option("iterations between two resets of opacities; 0: no resets", 60_000)
    scene_extent: float | None = option("meters; default: 1.1 times the largest camera distance from the center", None)
    min_extent: float = option("smallest extent in meters, if it is computed", 0.5)
    max_extent: float = option("largest extent in meters, if it is computed", 2.0)

    density_constraint: bool = option("limit the number of Gaussians on a face", True)
    min_points_per_face: int = option("fewest Gaussians on an occupied face", 4)
    max_points_per_face: int = option("most Gaussians on a face", 15)
    allow_empty_faces: bool = option("remove all Gaussians of faces that no image shows", True)
    min_face_pixels: float = option("an image shows a face if the face makes up this many of its pixels", 0.5)
    min_pixels: float = option("on a full face, Gaussians with fewer pixels in every image make room for others", 0.1)
    visibility_images: int = option("images in which pixels are counted, at least one of each camera", 16)
    seed: int = option("random seed of the order of images and the noise of splits", 0)

    def __post_init__(self) -> None:
        _check(self, 1, math.inf, "iterations", "shorten", "images_per_step", "start_downscale", "sh_degree_interval")
        _check(self, 1, math.inf, "densify_interval", "visibility_images")
        _check(self, 0, math.inf, "full_resolution_from", "densify_from", "prune_large_from", "opacity_reset_interval")
        _check(self, 0, math.inf, "min_face_pixels", "min_pixels", "seed")
        _check(self, 0, 1, "background", "init_opacity", "lambda_dssim", "min_opacity")
        _check(self, 0, 3, "sh_degree")
        if not 0 < self.init_opacity < 1:
            raise ValueError(f"--init_opacity is {self.init_opacity}, expected between 0 and 1")
        if not 0 < self.min_extent <= self.max_extent or (self.scene_extent is not None and self.scene_extent <= 0):
            raise ValueError(
                f"--scene_extent {self.scene_extent}, --min_extent {self.min_extent}, --max_extent {self.max_extent}: "
                "expected meters above 0, min at most max"
            )
        self.limits  # noqa: B018 (checks them)

    @property
    def limits(self) -> FaceLimits | None:
        """The density constraint; None if it is off."""
        return FaceLimits(self.min_points_per_face, self.max_points_per_face) if self.density_constraint else None

    def shortened(self) -> "FitSettings":
        """The settings with every iteration and interval divided by `shorten`; 0 remains 0."""
        divided = {name: max(1, round(value / self.shorten)) for name in TIMES if (value := getattr(self, name))}
        return dataclasses.replace(self, shorten=1.0, **divided)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _check(arguments: Any, low: float, high: float, *names: str) -> None:
    for name in names:
        value = getattr(arguments, name)
        if not low <= value <= high:
            bounds = f"at least {low}" if high == math.inf else f"{low} to {high}"
            raise ValueError(f"--{name} is {value}, expected {bounds}")
