"""The trainer of the Gaussian decoder: sequences and portraits become images, which are compared with the true frames.

ids, condition -> point model (frozen, teacher forcing) -> point features -.
ids -> dequantized points, portrait ---------------------------------------+-> GaussianDecoder -> canonical Gaussians
Gaussians, expression and pose of a frame -> Skinning -> render -> image -> L1, SSIM, LPIPS against the true one
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gaussian_tokenizer.avatars.skinning import Skinning
from gaussian_tokenizer.geometry.triangles import nearest_on_faces
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.rendering.image_metrics import coverage, psnr, ssim
from gaussian_tokenizer.rendering.splatting import render
from modeling import PointillistForCausalLM
from modeling.conversion import to_gaussians, vertex_points
from modeling.point_features import FeatureCache, point_features
from training.common.exact_trainer import ExactTrainer
from training.decoder.arguments import LossArguments
from training.decoder.losses import PerceptualLoss, offset_regularizer
from training.decoder.subjects import cameras_of, motion_of, on_background, portrait_of


@dataclass(frozen=True, eq=False)
class Points:
    """Points of B subjects, padded to the longest."""

    positions: Tensor  # (B, N, 3) meters, canonical
    faces: Tensor  # (B, N) int64
    counts: list[int]

    @property
    def mask(self) -> Tensor:
        """(B, N) True on real points."""
        numbers = torch.arange(self.positions.shape[1], device=self.positions.device)
        return numbers < torch.tensor(self.counts, device=numbers.device)[:, None]


class DecoderTrainer(ExactTrainer):
    """Trains `GaussianDecoder` on `TrainSubjects`, evaluates it on `EvaluationSubjects` (on white).

    Logs each loss beside their weighted sum; eval_psnr (dB), eval_ssim and eval_coverage, means over the held-out frames.
    """

    def __init__(
        self,
        *args,
        point_model: PointillistForCausalLM,
        head: HeadModel,
        losses: LossArguments,
        perceptual: PerceptualLoss | None,
        cache: FeatureCache | None,
        animation: str,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        # In a tuple, so that no wrapper takes the frozen networks for parts of the trained one.
        device = self.args.device
        self.frozen = (point_model.to(device).eval().requires_grad_(False), perceptual and perceptual.to(device))
        self.head, self.losses, self.cache, self.animation = head.to(device), losses, cache, animation
        self.tokenizer = self.train_dataset.subjects.tokenizer
        self.parts: dict[str, float] = {}
        self.steps_since_log = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        images, _, output, points = self.draw(model, inputs)
        losses: dict[str, list[Tensor]] = {"l1": [], "ssim": [], "lpips": []}
        for row, image in enumerate(images):
            truth = on_background(inputs["images"][row], inputs["background"][row])
            losses["l1"].append((image - truth).abs().mean())
            if self.losses.ssim_weight:
                losses["ssim"].append(1 - ssim(image, truth).mean())
            if self.frozen[1] is not None:
                losses["lpips"].append(self.frozen[1](image, truth).mean())
        means = {name: torch.stack(values).mean() for name, values in losses.items() if values}
        config = self.accelerator.unwrap_model(model).config
        means["offset"] = offset_regularizer(output.offsets, config.per_gaussian(points.mask, 1), config.max_offset)
        loss = sum(getattr(self.losses, f"{name}_weight") * value for name, value in means.items())
        for name, value in means.items():
            self.parts[name] = self.parts.get(name, 0.0) + float(value.detach())
        self.steps_since_log += 1
        return (loss, output) if return_outputs else loss

    def draw(self, model, batch: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor], object, Points]:
        """Images [(C, H, W, 3)] and alphas [(C, H, W, 1)] of each subject's target frames, the decoder's output and the points."""
        config = self.accelerator.unwrap_model(model).config
        points = self.points(batch, config.mode)
        output = model(
            positions=points.positions,
            point_features=self.features(batch) if config.reads_point_features else None,
            pixel_values=batch["pixel_values"],
            point_mask=None if min(points.counts) == max(points.counts) else points.mask,
            anchors=self.anchors(batch, points) if config.read_anchors else None,
            **(self.portrait_inputs(batch, points) if config.read_portrait else {}),
        )
        images, alphas = [], []
        for row, count in enumerate(points.counts):
            faces, motion = config.per_gaussian(points.faces[row, :count]), motion_of(batch, row)
            bound = Skinning.of_canonical(to_gaussians(output, row, len(faces)), faces, motion, self.head)
            posed, background = bound.pose(motion, self.animation), batch["background"][row, :, None].expand(-1, 3)
            drawn = render(posed, cameras_of(batch, row), background=background)
            images.append(drawn.image)
            alphas.append(drawn.alpha)
        return images, alphas, output, points

    def points(self, batch: Mapping[str, Tensor], mode: str) -> Points:
        """The points that become Gaussians: those of the sequences, or the head's vertices."""
        device = self.args.device
        if mode == "flame_position":
            rows = [vertex_points(self.head, motion_of(batch, row)) for row in range(len(batch["input_ids"]))]
        else:
            decoded = [self.tokenizer.decode(ids) for ids in batch["input_ids"].cpu()]
            rows = [(torch.as_tensor(d["positions"]), torch.as_tensor(d["faces"])) for d in decoded]
        positions, faces = (pad_sequence(values, batch_first=True).to(device) for values in zip(*rows))
        return Points(positions, faces, [len(faces) for _, faces in rows])

    def anchors(self, batch: Mapping[str, Tensor], points: Points) -> Tensor:
        """(B, N, 3) meters: the nearest point on each point's face, on the subject's own canonical head."""
        heads = [self.head.canonical_vertices(motion_of(batch, row)) for row in range(len(points.counts))]
        rows = zip(points.positions, points.faces, heads)
        return torch.stack([nearest_on_faces(*row, self.head.faces) for row in rows])

    def portrait_inputs(self, batch: Mapping[str, Tensor], points: Points) -> dict[str, Tensor]:
        """The portraits (B, K, 4, H, W), and where the points and their mirror images (B, N, K, 8) are in them."""
        clouds = zip(points.positions, points.faces, points.counts)
        rows = [
            portrait_of(batch, row).inputs(positions[:count], faces[:count], self.head)
            for row, (positions, faces, count) in enumerate(clouds)
        ]
        names = ("portrait_points", "mirror_points")
        padded = {name: pad_sequence([own[name] for own in rows], batch_first=True) for name in names}
        return {"portrait": torch.stack([own["portrait"] for own in rows])} | padded

    @torch.no_grad()
    def features(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, N, 4, D) hidden states of the point model for the sequences of the batch."""
        compute = point_features if self.cache is None else self.cache.features
        return compute(self.frozen[0], batch["input_ids"], **self.frozen[0].select_inputs(batch))

    def log(self, logs, *args, **kwargs):
        if "loss" in logs and self.steps_since_log:
            logs |= {f"loss_{name}": round(total / self.steps_since_log, 5) for name, total in self.parts.items()}
            self.parts, self.steps_since_log = {}, 0
        super().log(logs, *args, **kwargs)

    def batch_sums(self, model, batch):
        """(B, 6): sums of PSNR, SSIM, L1 and coverage over the frames of a subject, their number, and that of coverages."""
        with self.compute_loss_context_manager():
            images, alphas, _, _ = self.draw(model, batch)
        rows = []
        for row, (image, alpha) in enumerate(zip(images, alphas)):
            truth = on_background(batch["images"][row], batch["background"][row])
            covered = coverage(alpha, batch["images"][row][..., 3:])
            values = (psnr(image, truth), ssim(image, truth), (image - truth).abs().flatten(1).mean(1))
            sums = [each.sum() for each in (*values, covered.nan_to_num(nan=0.0), torch.ones_like(covered))]
            rows.append(torch.stack([*sums, covered.isfinite().sum()]))
        return torch.stack(rows).double()

    def mean_metrics(self, total):
        values = (total[:3] / total[4].clamp(min=1)).tolist()
        metrics = dict(zip(("psnr", "ssim", "l1", "loss"), [*values, values[2]]))
        if total[5]:  # the frames have alpha
            metrics["coverage"] = float(total[3] / total[5])
        return metrics
