"""Arguments of fitting avatars; read like those of pre-training (`arguments.parse_arguments`).

`FitSettings` decides the bytes of a result and goes into its report; `FitArguments` says what is fitted, and where. Defaults are
those of GaussianAvatars (Qian et al. 2024, section 4 and its published settings) with AvatarPointillist's density constraint.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from training.fitting.density_control import FaceLimits

# Iterations and periods: what `shorten` divides.
TIMES = (
    "iterations", "sh_degree_interval", "full_resolution_from", "densify_from", "densify_until", "densify_interval",
    "opacity_reset_interval", "prune_large_from",
)  # fmt: skip


@dataclass
class FitArguments:
    """What is fitted, and where."""

    data: str = field(metadata={"help": "tracked subject, or folder of such: VHAP exports, GaussianAvatars, Pixel3DMM"})
    head: str = field(metadata={"help": "procedural:600, a .safetensors, a FLAME .pkl, an ICT-FaceKit folder"})
    output_dir: str = field(
        metadata={"help": "folder for the avatars: one folder a subject, as build_corpus reads them"}
    )
    retry_failed: bool = field(default=False, metadata={"help": "fit what failed before once more"})
    save_every: int = field(default=10_000, metadata={"help": "iterations between checkpoints of a subject"})
    max_eval_images: int = field(
        default=64, metadata={"help": "held-out images of each kind that the report looks at, evenly spread"}
    )
    max_result_images: int | None = field(
        default=None, metadata={"help": "images copied beside the avatar, evenly spread; left out, all; 0, none"}
    )
    image_cache: int = field(default=4096, metadata={"help": "MB of decoded images kept in memory by a process"})
    disable_tqdm: bool = field(default=False, metadata={"help": "no progress bars"})
    device: str = field(default="auto", metadata={"help": "auto (a GPU if there is one), cpu or cuda"})

    def __post_init__(self) -> None:
        _check(self, at_least_one=("save_every", "max_eval_images"), at_least_zero=("image_cache",))
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"--device is {self.device!r}, expected auto, cpu or cuda")


@dataclass
class FitSettings:
    """How a subject is fitted. Learning rates are Adam's; lengths relative to a face are in units of its size."""

    iterations: int = field(default=600_000, metadata={"help": "steps of the optimizer"})
    shorten: float = field(
        default=1.0, metadata={"help": "divide all iterations and intervals by this: 20 makes 30,000 of 600,000"}
    )
    images_per_step: int = field(default=1, metadata={"help": "images drawn in a step"})
    start_downscale: int = field(default=1, metadata={"help": "side of the first images, 1/n; halved again and again"})
    full_resolution_from: int = field(default=0, metadata={"help": "iteration from which images have their own size"})
    background: float = field(default=1.0, metadata={"help": "gray level behind transparent images: 1 is white"})
    sh_degree: int = field(default=3, metadata={"help": "degree of the colors' spherical harmonics, 0 to 3"})
    sh_degree_interval: int = field(default=1000, metadata={"help": "iterations until one more degree is optimized"})
    init_opacity: float = field(default=0.1, metadata={"help": "opacity of the first Gaussians, one a face"})

    lambda_dssim: float = field(default=0.2, metadata={"help": "share of 1 - SSIM in the loss, the rest is L1"})
    position_weight: float = field(default=0.01, metadata={"help": "weight of leaving the face"})
    position_threshold: float = field(default=1.0, metadata={"help": "face sizes a Gaussian may be away for free"})
    scale_weight: float = field(default=1.0, metadata={"help": "weight of being large"})
    scale_threshold: float = field(default=0.6, metadata={"help": "face sizes a Gaussian may be large for free"})

    position_lr: float = field(default=0.005, metadata={"help": "of positions, times the scene's extent, at first"})
    position_lr_final: float = field(default=0.00005, metadata={"help": "and at last; exponential in between"})
    color_lr: float = field(default=0.0025, metadata={"help": "of the constant color"})
    sh_lr: float = field(default=0.000125, metadata={"help": "of the color that depends on the view"})
    opacity_lr: float = field(default=0.05, metadata={"help": "of opacities (logits)"})
    scale_lr: float = field(default=0.017, metadata={"help": "of scales (logarithms)"})
    rotation_lr: float = field(default=0.001, metadata={"help": "of rotations (quaternions)"})

    finetune_head: bool = field(default=True, metadata={"help": "optimize the tracked head parameters too"})
    expr_lr: float = field(default=1e-3, metadata={"help": "of expressions"})
    translation_lr: float = field(default=1e-6, metadata={"help": "of translations"})
    pose_lr: float = field(default=1e-5, metadata={"help": "of rotations of head, neck, jaw and eyes"})

    densify_from: int = field(default=10_000, metadata={"help": "no density control until this iteration"})
    densify_until: int = field(default=600_000, metadata={"help": "nor from this one on"})
    densify_interval: int = field(default=2000, metadata={"help": "iterations between density controls"})
    densify_grad_threshold: float = field(
        default=2e-4, metadata={"help": "mean screen-space gradient to clone or split at"}
    )
    percent_dense: float = field(default=0.01, metadata={"help": "of the extent: up to this size clone, above split"})
    min_opacity: float = field(default=0.005, metadata={"help": "prune below"})
    prune_large_from: int = field(
        default=60_000, metadata={"help": "iteration from which large ones are pruned; 0: never"}
    )
    max_scale: float = field(default=0.1, metadata={"help": "of the extent: prune larger ones"})
    max_radius: float = field(default=20.0, metadata={"help": "pixels on the screen: prune larger ones"})
    opacity_reset_interval: int = field(default=60_000, metadata={"help": "iterations between resets; 0: none"})
    scene_extent: float | None = field(
        default=None, metadata={"help": "meters; left out, 1.1 times the cameras' distance from their middle"}
    )
    min_extent: float = field(default=0.5, metadata={"help": "meters, what a measured extent is raised to"})
    max_extent: float = field(default=2.0, metadata={"help": "meters, what a measured extent is cut to"})

    density_constraint: bool = field(
        default=True, metadata={"help": "keep the number of Gaussians on a face in bounds"}
    )
    min_points_per_face: int = field(default=4, metadata={"help": "on an occupied face"})
    max_points_per_face: int = field(default=15, metadata={"help": "on any face"})
    allow_empty_faces: bool = field(default=True, metadata={"help": "empty faces that are not seen in any image"})
    min_face_pixels: float = field(
        default=0.5, metadata={"help": "a face is not seen that makes up fewer pixels of every image looked at"}
    )
    min_pixels: float = field(
        default=0.1,
        metadata={"help": "on a full face a Gaussian that makes up fewer of every image looked at gives way to others"},
    )
    visibility_images: int = field(
        default=16, metadata={"help": "images looked at for that, one of each camera at least"}
    )
    seed: int = field(default=0, metadata={"help": "of the order of images and of the noise of splits"})

    def __post_init__(self) -> None:
        _check(
            self,
            at_least_one=("iterations", "shorten", "images_per_step", "start_downscale", "sh_degree_interval",
                          "densify_interval", "visibility_images"),
            at_least_zero=("full_resolution_from", "densify_from", "prune_large_from", "opacity_reset_interval",
                           "lambda_dssim", "min_face_pixels", "min_pixels", "seed"),
            in_unit=("background", "init_opacity", "lambda_dssim", "min_opacity"),
        )  # fmt: skip
        if not 0 <= self.sh_degree <= 3:
            raise ValueError(f"--sh_degree is {self.sh_degree}, expected 0 to 3")
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
        """The density constraint; None if it is switched off."""
        return FaceLimits(self.min_points_per_face, self.max_points_per_face) if self.density_constraint else None

    def shortened(self) -> "FitSettings":
        """The schedule as it is carried out: every iteration and interval divided by `shorten`."""
        times = {name: getattr(self, name) for name in TIMES}
        divided = {name: max(1, round(value / self.shorten)) if value else 0 for name, value in times.items()}
        return dataclasses.replace(self, shorten=1.0, **divided)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _check(
    arguments: Any,
    at_least_one: tuple[str, ...] = (),
    at_least_zero: tuple[str, ...] = (),
    in_unit: tuple[str, ...] = (),
) -> None:
    for names, low, high in ((at_least_one, 1, None), (at_least_zero, 0, None), (in_unit, 0, 1)):
        for name in names:
            value = getattr(arguments, name)
            if not value >= low or (high is not None and value > high):
                bounds = f"at least {low}" if high is None else f"{low} to {high}"
                raise ValueError(f"--{name} is {value}, expected {bounds}")
