"""The trainer of the Gaussian decoder: sequences and portraits in, images out, compared with the true frames.

    ids, condition -> frozen point model -> point features -.
    ids -> dequantized points -----------------------------+-> GaussianDecoder -> canonical Gaussians
    portrait ----------------------------------------------'          |
    expression and pose of a frame -> Skinning -> render -> image -> L1, SSIM, LPIPS against the true one

The point model sees true sequences (teacher forcing) and is never trained here.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gaussian_tokenizer.avatars.skinning import Skinning
from gaussian_tokenizer.geometry.triangles import nearest_on_faces
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.rendering.image_metrics import psnr, ssim
from gaussian_tokenizer.rendering.splatting import render
from modeling import GaussianDecoder, PointillistForCausalLM
from modeling.conversion import to_gaussians, vertex_points
from modeling.point_features import FeatureCache, point_features
from training.common.exact_trainer import ExactTrainer
from training.decoder.losses import PerceptualLoss, offset_regularizer
from training.decoder.subjects import cameras_of, motion_of, on_background

CONDITION = ("pixel_values", "head_vertices", "head_normals")


@dataclass(frozen=True)
class LossWeights:
    """The paper's."""

    l1: float = 1.0
    ssim: float = 0.5
    lpips: float = 0.1
    offset: float = 0.1


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

    Logs each loss beside their weighted sum; eval_psnr (dB) and eval_ssim, means over the held-out frames.
    """

    def __init__(
        self,
        *args,
        point_model: PointillistForCausalLM,
        head: HeadModel,
        weights: LossWeights,
        perceptual: PerceptualLoss | None,
        cache: FeatureCache | None,
        animation: str,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        # In a tuple, so that no wrapper takes the frozen networks for a part of the trained one.
        device = self.args.device
        self.frozen = (point_model.to(device).eval().requires_grad_(False), perceptual and perceptual.to(device))
        self.head, self.weights, self.cache, self.animation = head.to(device), weights, cache, animation
        self.tokenizer = self.train_dataset.subjects.tokenizer
        self.parts: dict[str, float] = {}
        self.steps_since_log = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        images, output, points = self.draw(model, inputs)
        losses: dict[str, list[Tensor]] = {"l1": [], "ssim": [], "lpips": []}
        for row, image in enumerate(images):
            truth = on_background(inputs["images"][row], inputs["background"][row])
            losses["l1"].append((image - truth).abs().mean())
            if self.weights.ssim:
                losses["ssim"].append(1 - ssim(image, truth).mean())
            if self.frozen[1] is not None:
                losses["lpips"].append(self.frozen[1](image, truth).mean())
        means = {name: torch.stack(values).mean() for name, values in losses.items() if values}
        max_offset = self.accelerator.unwrap_model(model).config.max_offset
        means["offset"] = offset_regularizer(output.offsets, points.mask, max_offset)
        loss = sum(getattr(self.weights, name) * value for name, value in means.items())
        for name, value in means.items():
            self.parts[name] = self.parts.get(name, 0.0) + float(value.detach())
        self.steps_since_log += 1
        return (loss, output) if return_outputs else loss

    def draw(self, model, batch: Mapping[str, Tensor]) -> tuple[list[Tensor], object, Points]:
        """The images of each subject's target frames [(C, H, W, 3)], the decoder's output and the points."""
        config = self.accelerator.unwrap_model(model).config
        points = self.points(batch, config.mode)
        output = model(
            positions=points.positions,
            point_features=self.features(batch) if config.reads_point_features else None,
            pixel_values=batch["pixel_values"],
            point_mask=None if min(points.counts) == max(points.counts) else points.mask,
            anchors=self.anchors(batch, points) if config.read_anchors else None,
        )
        images = []
        for row, count in enumerate(points.counts):
            gaussians = to_gaussians(output, row, count)
            motion = motion_of(batch, row)
            bound = Skinning.of_canonical(gaussians, points.faces[row, :count], motion, self.head)
            posed = bound.pose(motion, self.animation)
            images.append(
                render(posed, cameras_of(batch, row), background=batch["background"][row, :, None].expand(-1, 3)).image
            )
        return images, output, points

    def points(self, batch: Mapping[str, Tensor], mode: str) -> Points:
        """What the decoder places its Gaussians on: the points of the sequences, or the head's vertices."""
        device = self.args.device
        if mode == "flame_position":
            rows = [vertex_points(self.head, motion_of(batch, row)) for row in range(len(batch["input_ids"]))]
        else:
            decoded = [self.tokenizer.decode(ids) for ids in batch["input_ids"].cpu()]
            rows = [(torch.as_tensor(d["positions"]), torch.as_tensor(d["faces"])) for d in decoded]
        counts = [len(faces) for _, faces in rows]
        positions = torch.zeros(len(rows), max(counts), 3, device=device)
        faces = torch.zeros(len(rows), max(counts), dtype=torch.int64, device=device)
        for row, (own_positions, own_faces) in enumerate(rows):
            positions[row, : counts[row]], faces[row, : counts[row]] = own_positions.to(device), own_faces.to(device)
        return Points(positions, faces, counts)

    def anchors(self, batch: Mapping[str, Tensor], points: Points) -> Tensor:
        """(B, N, 3) meters: the nearest point on each point's face, on the subject's own canonical head."""
        heads = [self.head.canonical_vertices(motion_of(batch, row)) for row in range(len(points.counts))]
        rows = zip(points.positions, points.faces, heads)
        return torch.stack([nearest_on_faces(*row, self.head.faces) for row in rows])

    @torch.no_grad()
    def features(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, N, 4, D) hidden states of the point model for the sequences that are read."""
        point_model = self.frozen[0]
        condition = {name: batch[name] for name in CONDITION if name in batch}
        if not point_model.config.use_vision_encoder:
            condition.pop("pixel_values", None)
        if self.cache is None:
            return point_features(point_model, batch["input_ids"], **condition)
        return self.cache.features(point_model, batch["input_ids"], **condition)

    def log(self, logs, *args, **kwargs):
        if "loss" in logs and self.steps_since_log:
            logs |= {f"loss_{name}": round(total / self.steps_since_log, 5) for name, total in self.parts.items()}
            self.parts, self.steps_since_log = {}, 0
        super().log(logs, *args, **kwargs)

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """PSNR and SSIM over all held-out frames, the same on every process."""
        begin = time.perf_counter()
        model = self.model_wrapped if self.model_wrapped is not None else self.model
        model.eval()
        sums = torch.zeros(4, dtype=torch.double, device=self.args.device)
        for batch in self.get_eval_dataloader(eval_dataset):
            batch = self.prepared(batch)
            with self.compute_loss_context_manager():
                images, _, _ = self.draw(model, batch)
            rows = []
            for row, image in enumerate(images):
                truth = on_background(batch["images"][row], batch["background"][row])
                frames = torch.full((len(image),), float(len(image)), device=image.device)
                values = torch.stack((psnr(image, truth), ssim(image, truth), (image - truth).abs().flatten(1).mean(1)))
                rows.append(torch.cat((values.sum(1), frames[:1])))
            sums += self.accelerator.gather_for_metrics(torch.stack(rows).double()).sum(0)
        total = sums[3].clamp(min=1)
        metrics = {
            f"{metric_key_prefix}_{name}": float(value / total) for name, value in zip(("psnr", "ssim", "l1"), sums)
        }
        metrics[f"{metric_key_prefix}_loss"] = metrics[f"{metric_key_prefix}_l1"]
        metrics[f"{metric_key_prefix}_runtime"] = round(time.perf_counter() - begin, 3)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def decoder_of(trainer: DecoderTrainer) -> GaussianDecoder:
    """The trained network without its wrappers."""
    return trainer.accelerator.unwrap_model(trainer.model)
