"""The decoder's trainer in this process: its loss and its metrics against the same written out, every mode, every gradient."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from curves import assert_pinned
from transformers import Dinov2Config

from gaussian_tokenizer.avatars.gaussians import Gaussians
from gaussian_tokenizer.avatars.skinning import Skinning
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import FRAME_KEYS, HeadParameters
from gaussian_tokenizer.heads.procedural_head import build_procedural_head
from gaussian_tokenizer.rendering.image_metrics import psnr, ssim
from gaussian_tokenizer.rendering.splatting import render
from modeling import GaussianDecoder, GaussianDecoderConfig, PointillistForCausalLM, to_gaussians
from modeling.conversion import vertex_points
from modeling.point_features import FeatureCache, point_features
from training.common.rows import HEAD_COLUMNS
from training.decoder.arguments import DecoderTrainingArguments, LossArguments
from training.decoder.subjects import (
    EvaluationSubjects,
    SubjectRows,
    TrainSubjects,
    cameras_of,
    collate_subjects,
    motion_of,
    on_background,
)
from training.decoder.trainer import DecoderTrainer

PAPER = LossArguments()
MODES = ("full", "ar_feature", "position", "flame_position")


@pytest.fixture(autouse=True)
def number_of_threads():
    """Arguments set it for the process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def head() -> HeadModel:
    return build_procedural_head(600)


@pytest.fixture
def make_trainer(corpus, point_model, head, tmp_path):
    def make(mode="full", losses=PAPER, cache=None, max_steps=2, learning_rate=1e-4, **config) -> DecoderTrainer:
        torch.manual_seed(0)
        points = PointillistForCausalLM.from_pretrained(point_model)
        settings = dict(
            mode=mode, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, point_feature_size=32, init_scale=0.015,
            max_scale=0.06, init_opacity=0.5, freeze_vision_encoder=False, initializer_range=0.1,
            vision_config=Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=56),
        )  # fmt: skip
        arguments = DecoderTrainingArguments(
            output_dir=str(tmp_path / "run"), max_steps=max_steps, learning_rate=learning_rate, per_device_train_batch_size=2,
            per_device_eval_batch_size=2, eval_strategy="no", save_strategy="no", use_cpu=True, disable_tqdm=True, num_threads=1,
            warmup_steps=0, logging_steps=1,
        )  # fmt: skip
        reads = config.get("read_portrait", False)
        train, heldout = (SubjectRows(corpus, split, HEAD_COLUMNS, None, reads) for split in ("train", "validation"))
        return DecoderTrainer(
            model=GaussianDecoder(GaussianDecoderConfig(**(settings | config))),
            args=arguments,
            train_dataset=TrainSubjects(train, 2 * max_steps, 2, seed=0, random_source=False),
            eval_dataset=EvaluationSubjects(heldout, 3),
            data_collator=partial(collate_subjects, pad_token_id=points.config.pad_token_id),
            point_model=points,
            head=head,
            losses=losses,
            perceptual=None,
            cache=None if cache is None else FeatureCache(cache, points),
            animation="lbs",
        )

    return make


def batch_of(trainer: DecoderTrainer, rows=(0, 1)) -> dict:
    return trainer.data_collator([trainer.train_dataset[row] for row in rows])


@pytest.mark.parametrize("each", [1, 2])
def test_the_loss_is_the_papers_sum_over_images_drawn_one_subject_at_a_time(make_trainer, head, each):
    """Subject by subject without padding, against the trainer's padded batch."""
    trainer = make_trainer(losses=LossArguments(0.7, 0.3, 0.0, offset_weight=0.2), gaussians_per_point=each)
    batch = batch_of(trainer)
    assert (
        len({int((ids < trainer.tokenizer.bos_token_id).sum()) for ids in batch["input_ids"]}) == 2
    )  # so there is padding
    loss = trainer.compute_loss(trainer.model, batch)
    parts = {"l1": [], "ssim": []}
    offsets = []
    for row in range(2):
        ids = batch["input_ids"][row : row + 1]
        ids = ids[:, : int((ids < trainer.tokenizer.bos_token_id).sum()) + 2]
        points = trainer.tokenizer.decode(ids[0])
        condition = {name: batch[name][row : row + 1] for name in ("pixel_values", "head_vertices", "head_normals")}
        output = trainer.model(
            positions=torch.as_tensor(points["positions"])[None],
            point_features=point_features(trainer.frozen[0], ids, **condition),
            pixel_values=condition["pixel_values"],
        )
        motion = motion_of(batch, row)
        faces = torch.tensor([face for face in points["faces"].tolist() for _ in range(each)])
        posed = Skinning.of_canonical(to_gaussians(output), faces, motion, head).pose(motion)
        cameras = cameras_of(batch, row)
        images = [
            render(posed.frames(i), cameras[i], background=float(batch["background"][row, i])).image for i in range(2)
        ]
        truth = on_background(batch["images"][row], batch["background"][row])
        parts["l1"].append((torch.cat(images) - truth).abs().mean())
        parts["ssim"].append(1 - ssim(torch.cat(images), truth).mean())
        offsets.append((output.offsets[0] / trainer.model.config.max_offset).square().sum(-1))
    expected = 0.7 * sum(parts["l1"]) / 2 + 0.3 * sum(parts["ssim"]) / 2 + 0.2 * torch.cat(offsets).mean()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)


READ = dict(read_portrait=True, portrait_channels=4)


@pytest.mark.parametrize(
    ("mode", "config"),
    [
        *((mode, {}) for mode in MODES),
        ("full", dict(read_anchors=True)),
        *((mode, READ) for mode in MODES),
        ("position", READ | dict(attention="portrait")),
        ("position", READ | dict(gaussians_per_point=2)),
        ("flame_position", dict(gaussians_per_point=3)),
    ],
)
def test_every_parameter_of_every_mode_learns_and_nothing_else_does(make_trainer, mode, config):
    trainer = make_trainer(mode, **config)
    frozen = copy.deepcopy(trainer.frozen[0].state_dict())
    loss = trainer.compute_loss(trainer.model, batch_of(trainer))
    loss.backward()
    # The last layers start from zero weights: what lies before them gets a gradient from the second step on.
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter -= 0.1 * parameter.grad
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, batch_of(trainer)).backward()
    still = [
        name
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad and not parameter.grad.abs().sum() > 0
    ]
    assert not still
    assert all(torch.equal(value, frozen[name]) for name, value in trainer.frozen[0].state_dict().items())
    assert not any(parameter.requires_grad for parameter in trainer.frozen[0].parameters())


def test_anchors_are_the_nearest_points_of_the_faces_on_each_subjects_own_head(make_trainer, head):
    trainer = make_trainer(read_anchors=True)
    batch = batch_of(trainer)
    points = trainer.points(batch, "full")
    anchors = trainer.anchors(batch, points)
    corners = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0)).log().neg()
    samples = corners / corners.sum(-1, keepdim=True)  # barycentrics, uniform over a triangle
    for row in range(2):
        person = replace(HeadParameters.zeros(head.n_shape, head.n_expression), shape=batch["shape"][row])
        triangles = head.canonical_vertices(person)[head.faces[points.faces[row, :10]]]
        tried = (torch.einsum("sc,nci->nsi", samples, triangles) - points.positions[row, :10, None]).norm(dim=-1)
        found = (anchors[row, :10] - points.positions[row, :10]).norm(dim=-1)
        assert (found <= tried.min(1).values + 1e-6).all(), "no point of the face is nearer"
        assert (tried.min(1).values - found < 1e-3).all(), "the distance is that to the face, not to something nearer"


@pytest.mark.parametrize("mode", ["position", "flame_position"])
def test_the_portrait_is_read_where_its_own_camera_and_moment_put_each_point(make_trainer, head, mode):
    """Against the first frame of the corpus, and points posed and projected by the renderer's own functions."""
    trainer = make_trainer(mode, **READ)
    batch = trainer.data_collator([trainer.eval_dataset[row] for row in range(2)])
    points = trainer.points(batch, mode)
    inputs = trainer.portrait_inputs(batch, points)
    for row, count in enumerate(points.counts):
        subjects = trainer.eval_dataset.subjects
        frame = subjects.frames[subjects.frame_rows(row)[0]]
        own = {name: torch.tensor([frame[name]], dtype=torch.float32) for name in FRAME_KEYS}
        motion = HeadParameters(shape=batch["shape"][row], **own)
        zero = torch.zeros(count, 3)
        still = Gaussians(
            points.positions[row, None, :count], zero[None] + 0.01, torch.ones(1, count, 4), zero[:, 0], zero[:, None]
        )
        at = Skinning.of_canonical(still, points.faces[row, :count], motion, head).pose(motion).positions[0].double()
        view = torch.tensor(frame["viewmat"], dtype=torch.float64)
        x, y, z = (at @ view[:3, :3].T + view[:3, 3]).unbind(-1)
        u = 2 * (frame["fx"] * x / z + frame["cx"]) / frame["width"] - 1
        v = 2 * (frame["fy"] * y / z + frame["cy"]) / frame["height"] - 1
        found = inputs["portrait_points"][row, :count, 0, :3]
        torch.testing.assert_close(found, torch.stack((u, v, z), -1).float(), atol=1e-4, rtol=0)
    expected = on_background(batch["images"][:, 0], torch.ones(2))
    shown = inputs["portrait"][:, 0, :3].permute(0, 2, 3, 1)
    assert (shown - expected).abs().max() < 0.02  # resized from 56 to 56 pixels: rounded to bytes


def test_the_gradient_of_a_step_reaches_the_reader_through_every_image(make_trainer):
    trainer = make_trainer("position", **READ)
    trainer.train_dataset.num_references = trainer.train_dataset.items_per_step = 3
    batches = [batch_of(trainer, (2 * i, 2 * i + 1)) for i in (0, 3, 6, 9)]
    batch = max(batches, key=lambda batch: batch["portrait"].shape[1])
    assert batch["portrait"].shape[:2] == (2, 3)
    batch["portrait"].requires_grad_()
    trainer.compute_loss(trainer.model, batch).backward()
    assert (batch["portrait"].grad.abs().sum((2, 3, 4)) > 0).all()
    assert all(parameter.grad is not None for parameter in trainer.model.reader.parameters())


def test_portraits_of_training_stand_before_random_colors_and_some_without_alpha(make_trainer):
    dataset = make_trainer(max_steps=40, **READ).train_dataset
    items = [dataset[index] for index in range(40)]
    corners = {tuple(item["portrait"][0, :3, 0, 0].tolist()) for item in items}
    hidden = [bool((item["portrait"][0, 3] == 1).all()) for item in items]
    assert len(corners) == 40 and 0 < sum(hidden) < 20
    for name, value in dataset[7].items():
        assert (value == items[7][name]).all(), name


def test_evaluation_is_the_mean_over_all_held_out_frames_on_white(make_trainer):
    trainer = make_trainer()
    metrics = trainer.evaluate()
    values = []
    with torch.no_grad():
        for row in range(len(trainer.eval_dataset)):
            batch = trainer.data_collator([trainer.eval_dataset[row]])
            (image,), (alpha,), *_ = trainer.draw(trainer.model, batch)
            truth = on_background(batch["images"][0], torch.ones(len(image)))
            covered = []
            for own, true in zip(alpha.numpy() > 0.5, batch["images"][0, ..., 3:].numpy() > 0.5):
                covered.append(float((own & true).sum() / true.sum()))
            values += list(zip(psnr(image, truth).tolist(), ssim(image, truth).tolist(), covered))
    assert len(values) == 4 * 3
    mean_psnr, mean_ssim, mean_coverage = torch.tensor(values).mean(0).tolist()
    assert metrics["eval_coverage"] == pytest.approx(mean_coverage, rel=1e-5) and 0 < mean_coverage < 1
    assert metrics["eval_psnr"] == pytest.approx(mean_psnr, rel=1e-5)
    assert metrics["eval_ssim"] == pytest.approx(mean_ssim, rel=1e-4)


def test_twenty_steps_follow_the_pinned_curve(make_trainer):
    """After an intended change: POINTILLIST_PIN=1 python -m pytest tests/training -k pinned_curve"""
    trainer = make_trainer(max_steps=20, learning_rate=3e-3)
    trainer.train()
    assert_pinned("decoder", [entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def test_features_from_the_cache_are_those_that_are_computed(make_trainer, tmp_path):
    plain, cached = make_trainer(), make_trainer(cache=tmp_path / "features")
    batch = batch_of(plain)
    features = plain.features(batch)
    for _ in range(2):  # computed, then read
        torch.testing.assert_close(cached.features(batch), features, rtol=1e-3, atol=1e-3)
    assert len(list((tmp_path / "features").iterdir())) == 2


def test_vertex_points_are_vertices_on_faces_they_belong_to(head):
    trainer_motion = motion_of({"shape": torch.zeros(1, head.n_shape)} | poses(head), 0)
    positions, faces = vertex_points(head, trainer_motion)
    torch.testing.assert_close(positions, head.template)
    assert (head.faces[faces] == torch.arange(head.n_vertices)[:, None]).any(1).all()


def poses(head: HeadModel) -> dict:
    sizes = {"expr": head.n_expression, "rotation": 3, "neck_pose": 3, "jaw_pose": 3, "eyes_pose": 6, "translation": 3}
    return {name: torch.zeros(1, 1, size) for name, size in sizes.items()}
