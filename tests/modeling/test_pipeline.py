"""The pipeline: from a portrait to an avatar that moves, its folder in a clean interpreter, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image
from pretended_device import PretendedDevice
from transformers import Dinov2Config

from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.avatars.motions import synthetic_motion
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.heads.procedural_head import build_procedural_head
from gaussian_tokenizer.rendering.cameras import Cameras, default_camera, portrait_cameras
from gaussian_tokenizer.rendering.portrait_points import Portrait, face_pixels, portrait_points
from gaussian_tokenizer.rendering.splatting import render
from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer
from modeling import (
    AvatarPipeline,
    GaussianDecoder,
    GaussianDecoderConfig,
    PointillistConfig,
    PointillistForCausalLM,
    Reference,
)
from modeling.pipeline import SAMPLING
from modeling.ranking import likeliest
from modeling.refinement import refine

VISION = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=28)


@pytest.fixture(scope="module")
def head() -> HeadModel:
    return build_procedural_head(600)


def components(head: HeadModel, **changes) -> dict:
    """Four small components that belong together, but for `changes` (component__setting=value)."""
    torch.manual_seed(0)
    settings = {
        "tokenizer": dict(n_bins=16, n_faces=600, bounds=[[-0.2, -0.3, -0.2], [0.2, 0.2, 0.2]], image_size=28,
                          head_name=head.name, head_hash=head.hash),
        "point": dict(n_bins=16, n_faces=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                      num_attention_heads=2, head_dim=16, sliding_window=64, vision_config=Dinov2Config(**VISION),
                      point_latents=4, point_hidden_size=16, point_layers=1, point_attention_heads=2, initializer_range=0.2),
        "decoder": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, point_feature_size=32,
                        vision_config=Dinov2Config(**VISION), initializer_range=0.2),
    }  # fmt: skip
    for name, value in changes.items():
        component, setting = name.split("__")
        settings[component][setting] = value
    return {
        "tokenizer": GaussianTokenizer(**settings["tokenizer"]),
        "point_model": PointillistForCausalLM(PointillistConfig(**settings["point"])),
        "gaussian_decoder": GaussianDecoder(GaussianDecoderConfig(**settings["decoder"])),
        "head": head,
    }


@pytest.fixture(scope="module")
def pipeline(head) -> AvatarPipeline:
    return AvatarPipeline(**components(head))


@pytest.fixture(scope="module")
def saved(pipeline, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "saved"
    image = folder.parent / "look.png"
    Image.new("RGB", (8, 8), "red").save(image)
    pipeline.save_pretrained(folder, images=[image], card="Untrained: for tests.")
    return folder


def portrait(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    random = np.random.default_rng(0)
    return Image.fromarray(random.integers(0, 255, (*size[::-1], 4), dtype=np.uint8)).convert(mode)


def same(first: GaussianAvatar, second: GaussianAvatar) -> bool:
    return first.tensors().keys() == second.tensors().keys() and all(
        torch.equal(value, second.tensors()[name]) for name, value in first.tensors().items()
    )


def test_a_portrait_becomes_an_avatar_that_moves_and_survives_its_file(pipeline, head, tmp_path):
    avatar = pipeline(portrait(), seed=0, max_points=12)
    assert 1 <= len(avatar) <= 12 and set(avatar.tensors()) >= {"sh", "opacities", "scales", "quats"}
    moved = avatar.posed(synthetic_motion("nod", head, 5))
    assert moved.num_frames == 5 and (moved.positions[0] - moved.positions[1]).abs().max() > 1e-4
    avatar.save(tmp_path / "avatar")
    assert same(GaussianAvatar.load(tmp_path / "avatar", head), avatar)


def test_a_seed_makes_the_same_avatar_and_another_seed_another(pipeline):
    first, again, other = (pipeline(portrait(), seed=seed, max_points=12) for seed in (3, 3, 4))
    assert same(first, again) and not same(first, other)


def test_head_parameters_give_the_shape_and_nothing_of_their_moment(pipeline, head):
    params = HeadParameters.zeros(head.n_shape, head.n_expression, 2)
    params.shape[0] = 2.0
    plain = pipeline(portrait(), params, seed=0, max_points=8)
    params.expr[0, 0], params.neck_pose[0, 1] = 1.0, 0.5
    assert same(plain, pipeline(portrait(), params, seed=0, max_points=8))
    assert torch.equal(plain.params.shape, params.shape) and not plain.params.expr.any()


def test_the_condition_is_encoded_once_for_all_candidates_and_is_each_subjects_own(pipeline, head):
    params = [HeadParameters.zeros(head.n_shape, head.n_expression) for _ in range(2)]
    params[1].shape[0] = 3.0
    inputs = pipeline.inputs([portrait(), portrait("L", (28, 60))], params)
    encoded = []
    hook = pipeline.point_model.condition_encoder.register_forward_hook(lambda *call: encoded.append(call[-1]))
    found = pipeline.generate(inputs, seed=2, max_points=10, candidates=3)
    hook.remove()
    assert [len(each) for each in encoded] == [2]
    torch.manual_seed(2)
    every = pipeline.point_model.generate(
        condition_embeds=encoded[0].repeat_interleave(3, 0), **SAMPLING, max_points=10, output_point_features=True
    )
    expected = likeliest(pipeline.point_model, every, 3)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.point_features, expected.point_features, atol=1e-5, rtol=1e-4)


def test_several_portraits_give_an_avatar_each(pipeline, head):
    shapes = [HeadParameters.zeros(head.n_shape, head.n_expression) for _ in range(2)]
    shapes[1].shape[0] = 1.0
    avatars = pipeline([portrait(), portrait("L", (28, 60))], shapes, seed=0, max_points=10)
    assert len(avatars) == 2
    assert torch.equal(avatars[1].params.shape, shapes[1].shape)
    with pytest.raises(ValueError, match="2 portraits but head parameters of 1"):
        pipeline([portrait(), portrait()], shapes[:1])


@pytest.mark.newest
def test_each_gaussian_is_what_the_decoder_says_of_its_point(pipeline, head):
    inputs = pipeline.inputs([portrait()], [HeadParameters.zeros(head.n_shape, head.n_expression)])
    written = pipeline.generate(inputs, seed=1, max_points=9)
    (points,), (features,) = pipeline.decode_points(written)
    avatar = pipeline(portrait(), seed=1, max_points=9)
    with torch.no_grad():
        output = pipeline.gaussian_decoder(
            positions=torch.as_tensor(points["positions"])[None],
            point_features=features[None],
            pixel_values=inputs["pixel_values"],
        )
    assert torch.equal(avatar.faces, torch.as_tensor(points["faces"]))
    gaussians = avatar.canonical_gaussians()
    torch.testing.assert_close(gaussians.positions, output.positions, atol=1e-6, rtol=0)
    torch.testing.assert_close(gaussians.scales, output.scales, rtol=1e-4, atol=0)
    torch.testing.assert_close(gaussians.opacities, output.opacities[0])
    torch.testing.assert_close(gaussians.sh, output.sh[0])


@pytest.mark.parametrize("image", [
    portrait("RGBA"), portrait("L"), portrait("RGB", (1, 1)), portrait("P"),
    Image.fromarray(np.full((9, 7), 40_000, np.uint16)),
])  # fmt: skip
def test_any_kind_of_image_is_a_portrait(pipeline, image):
    assert len(pipeline(image, seed=0, max_points=3)) >= 1


def test_what_is_not_an_image_or_not_of_this_head_is_refused(pipeline, head, tmp_path):
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(ValueError, match="cannot be read"):
        pipeline(tmp_path / "text.png")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        pipeline(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match="expr of size 3"):
        pipeline(portrait(), HeadParameters.zeros(head.n_shape, 3))


# ---- steps against the portrait


def test_refinement_makes_the_avatar_more_like_the_portrait_and_is_off_by_default(pipeline, head):
    image, camera = Image.new("RGBA", (40, 30), (200, 60, 30, 255)), default_camera(head, 40, 30)
    image.putpixel((0, 0), (0, 0, 0, 0))  # with alpha: a dozen points have no silhouette
    plain = pipeline(image, seed=0, max_points=12, camera=camera)
    assert same(plain, pipeline(image, seed=0, max_points=12, refine_steps=0))
    refined = pipeline([image], seed=0, max_points=12, camera=camera, refine_steps=8)[0]
    assert same(refined, pipeline(image, seed=0, max_points=12, camera=camera, refine_steps=8))
    (read,) = pipeline.portraits([image], [refined.params], [camera], needed=True)
    assert same(refined, refine(plain, read, 8)) and not same(refined, plain)
    assert pipeline.portraits([image], [refined.params], [camera]) == [None]
    with pytest.warns(UserWarning, match="no camera was given for the portrait"):
        assert same(refined, pipeline(image, seed=0, max_points=12, refine_steps=8))


def test_refinement_is_refused_before_anything_is_generated(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline, "generate", None)
    with pytest.raises(ValueError, match="refine_steps is -2, expected a whole number"):
        pipeline(portrait(), refine_steps=-2)


# ---- a decoder that reads the portrait


@pytest.fixture(scope="module")
def reader(head) -> AvatarPipeline:
    return AvatarPipeline(**components(head, decoder__read_portrait=True, decoder__portrait_channels=4))


def colors_of_head(
    reader: AvatarPipeline,
    image: Image.Image,
    params: HeadParameters,
    camera: Cameras,
    references: Sequence[Reference] = (),
) -> torch.Tensor:
    """(F, 3) of the avatar with a point in the middle of each face."""
    head, pixels = reader.head, reader.inputs([image], [params])["pixel_values"][0]
    points = {"positions": head.canonical_vertices(params)[head.faces].mean(1), "faces": torch.arange(head.n_faces)}
    (read,) = reader.portraits([image], [params], [camera], [references])
    avatar = reader.decode_attributes(points, torch.zeros(head.n_faces, 4, 32), pixels, params, read)
    return avatar.canonical_gaussians().colors


def test_a_portrait_is_read_by_its_camera_and_moment(reader, head):
    params = HeadParameters.zeros(head.n_shape, head.n_expression)
    plain = colors_of_head(reader, portrait(), params, default_camera(head, 40, 30))
    aside = colors_of_head(reader, portrait(), params, Cameras.orbit((0.0, 0.0, 0.0), 1.0, [40.0], 0.0, 100.0, 40, 30))
    params.neck_pose[0, 1] = 0.5
    turned = colors_of_head(reader, portrait(), params, default_camera(head, 40, 30))
    for other in (aside, turned):
        assert ((plain - other).abs().amax(1) > 0.01).float().mean() > 0.5


def test_the_colors_of_the_portrait_are_those_of_the_avatar(reader, head):
    """A new decoder starts from what it reads, where the portrait shows the point or its mirror image."""
    params, camera = HeadParameters.zeros(head.n_shape, head.n_expression), default_camera(head, 30, 30)
    facing = head.normals(head.template)[head.faces].mean(1)[:, 2] > 0.3
    for channel, name in enumerate(("red", "lime", "blue")):
        colors = colors_of_head(reader, Image.new("RGB", (30, 30), name), params, camera)
        assert (colors.argmax(1) == channel)[facing].float().mean() > 0.95
        assert (colors[facing, channel] > 0.95).float().mean() > 0.6


def test_a_camera_that_does_not_fit_its_portrait_is_refused(reader, head):
    square = portrait_cameras(head, 64)
    with pytest.raises(
        ValueError, match="camera is for images of 64 x 64 pixels, the portrait has the aspect of 28 x 21"
    ):
        reader(portrait(), camera=square, max_points=3)
    with pytest.raises(ValueError, match="2 portraits but 1 cameras"):
        reader([portrait(), portrait()], camera=[square], max_points=3)


def test_what_the_portrait_does_not_show_is_read_in_the_references(reader, head):
    """A red person from the front, blue from behind; without the second image the back is like the front."""
    params = HeadParameters.zeros(head.n_shape, head.n_expression)
    red, blue = (Image.new("RGB", (30, 30), name) for name in ("red", "blue"))
    front, back = (Cameras.orbit((0.0, 0.0, 0.0), 1.0, [yaw], 0.0, 100.0, 30, 30) for yaw in (0.0, 180.0))
    alone = colors_of_head(reader, red, params, front)
    both = colors_of_head(reader, red, params, front, [Reference(blue, params, back)])
    centers, faces = head.template[head.faces].mean(1), torch.arange(head.n_faces)
    seen = [portrait_points(centers, faces, params, head, camera)[0][:, -1] > 0 for camera in (front, back)]
    only = [seen[0] & ~seen[1], seen[1] & ~seen[0]]
    assert all(each.sum() > 100 for each in only)
    assert (both.argmax(1) == 0)[only[0]].float().mean() > 0.95 and (both.argmax(1) == 2)[only[1]].float().mean() > 0.95
    assert (alone.argmax(1) == 2)[only[1]].float().mean() < 0.5


def test_references_are_given_to_one_portrait_or_as_a_list_for_each(reader, head):
    params, cameras = (
        HeadParameters.zeros(head.n_shape, head.n_expression),
        portrait_cameras(head, 28, [0.0, 60.0, -60.0]),
    )
    images = [portrait("L", (28, 28)), portrait("RGB", (28, 28)), portrait("P", (28, 28))]
    more = [Reference(image, params, camera) for image, camera in zip(images[1:], (cameras[1], cameras[2]))]
    options = dict(camera=cameras[0], seed=0, max_points=12)
    alone, found = reader(images[0], params, **options), reader(images[0], params, references=more, **options)
    assert torch.equal(alone.positions.round(decimals=2), found.positions.round(decimals=2)) and not same(alone, found)
    turned = reader(images[0], params, references=[tuple(each) for each in more[::-1]], **options)
    for name, value in found.tensors().items():
        torch.testing.assert_close(turned.tensors()[name], value, atol=1e-5, rtol=1e-4)
    (listed,) = reader([images[0]], [params], references=[more], **options)
    assert same(listed, found)
    every = reader([images[0]] * 2, [params] * 2, references=[[], more], **options | {"camera": [cameras[0]] * 2})
    inputs = reader.portraits([images[0]] * 2, [params] * 2, [cameras[0]] * 2, [[], more])
    assert len(every) == 2 and [len(each.references) for each in inputs] == [0, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: own._replace(camera=None), "reference 1 has no camera: a point is found in it only by both"),
        (lambda own: own._replace(head_params=None), "reference 1 has no head_params"),
        (lambda own: own._replace(head_params=HeadParameters.zeros(3, 5)), "reference 1: head parameters have shape of size 3"),
        (lambda own: own._replace(image=portrait("RGB", (60, 20))), "reference 1: the camera is for images of 28 x 28 pixels"),
        (lambda own: own.image, r"reference 1 is a Image, expected Reference\(image, head_params, camera\)"),
    ],
)  # fmt: skip
def test_a_reference_that_cannot_be_read_is_refused_before_anything_is_generated(
    reader, head, monkeypatch, change, message
):
    monkeypatch.setattr(reader, "generate", None)
    params, camera = HeadParameters.zeros(head.n_shape, head.n_expression), portrait_cameras(head, 28)[0]
    own = Reference(portrait("RGB", (28, 28)), params, camera)
    with pytest.raises(ValueError, match=message):
        reader(own.image, params, camera=camera, references=[own, change(own)])


def test_references_of_too_few_portraits_or_for_a_decoder_that_reads_none_are_refused(pipeline, reader, head):
    params, camera = HeadParameters.zeros(head.n_shape, head.n_expression), portrait_cameras(head, 28)[0]
    own = Reference(portrait("RGB", (28, 28)), params, camera)
    with pytest.raises(ValueError, match="2 portraits but references of 1; give a list for each portrait"):
        reader([own.image] * 2, [params] * 2, camera=camera, references=[[own]])
    with pytest.raises(ValueError, match="this Gaussian decoder does not read the portrait"):
        pipeline(own.image, params, camera=camera, references=[own])


def test_without_a_camera_the_framing_of_synthetic_portraits_is_assumed_and_said(reader, head):
    with pytest.warns(UserWarning, match="no camera was given for the portrait"):
        found = reader(portrait(), seed=0, max_points=8)
    assert same(found, reader(portrait(), camera=default_camera(head, 40, 30), seed=0, max_points=8))


def test_a_point_model_reads_each_subjects_portrait_at_its_faces(head):
    reads = {"point__level": "point", "point__mesh_aware_faces": True, "point__read_portrait": True}
    pipeline = AvatarPipeline(**components(head, **reads))
    images, params = (
        [portrait(), portrait("RGBA", (28, 28))],
        [HeadParameters.zeros(head.n_shape, head.n_expression) for _ in range(2)],
    )
    params[1].jaw_pose[0, 0] = 0.3
    cameras = [default_camera(head, 40, 30), portrait_cameras(head, 28, [25.0])[0]]
    seen = pipeline.portraits(images, params, cameras)
    inputs = pipeline.inputs(images, params, seen)
    for found, image, own, camera in zip(inputs["face_pixels"], images, params, cameras):
        assert torch.equal(found, face_pixels(Portrait.of(image, own, camera, head, 28), head))
    both = pipeline(images, params, camera=cameras, seed=0, max_points=8, candidates=2)
    again = pipeline.generate(inputs, seed=0, max_points=8, candidates=2)
    for avatar, points in zip(both, pipeline.decode_points(again)[0]):
        assert torch.equal(avatar.faces, torch.as_tensor(points["faces"]))
    with pytest.raises(ValueError, match="2 images came with 0 portraits"):
        pipeline.inputs(images, params)


@torch.no_grad()
def test_every_gaussian_of_a_point_is_bound_to_its_face(head):
    pipeline = AvatarPipeline(**components(head, decoder__gaussians_per_point=2, decoder__read_portrait=True))
    params, camera = HeadParameters.zeros(head.n_shape, head.n_expression), default_camera(head, 40, 30)
    image = portrait()
    output = pipeline.generate(pipeline.inputs([image], [params]), seed=0, max_points=8)
    (points,), _ = pipeline.decode_points(output)
    avatar = pipeline(image, params, camera=camera, seed=0, max_points=8)
    assert avatar.faces.tolist() == [face for face in points["faces"].tolist() for _ in range(2)]
    found = avatar.canonical_gaussians().positions[0].unflatten(0, (-1, 2))
    away = found - torch.as_tensor(points["positions"])[:, None]
    assert (away.norm(dim=-1) < pipeline.gaussian_decoder.config.init_scale).all()
    assert (away[:, 0] - away[:, 1]).norm(dim=-1).min() > 1e-3
    assert avatar.posed(synthetic_motion("nod", head, 2)).positions.shape == (2, len(avatar), 3)


@pytest.mark.parametrize("changes", [{}, {"decoder__read_anchors": True}, {"decoder__read_portrait": True}])
@pytest.mark.filterwarnings("ignore:no camera was given")
def test_on_another_device_nothing_is_left_behind_from_the_portrait_to_the_image(head, changes):
    shape = HeadParameters.zeros(head.n_shape, head.n_expression)
    shape.shape[0] = 1.0
    pipeline, motion = AvatarPipeline(**components(head, **changes)), synthetic_motion("nod", head, 2)
    expected = pipeline(portrait(), shape, seed=0, max_points=8)
    with PretendedDevice() as device:
        avatar = pipeline.to(device)(portrait(), shape, seed=0, max_points=8)
        assert {value.device for value in avatar.tensors().values()} == {device}
        refined = pipeline(portrait(), shape, seed=0, max_points=8, refine_steps=1)
        assert {value.device for value in refined.tensors().values()} == {device}
        for method in ("lbs", "face_frames"):
            posed = avatar.posed(motion, method)
            assert render(posed, portrait_cameras(head, size=24)[0:1]).image.device == posed.positions.device == device
        back = avatar.to("cpu").tensors()
    for name, value in expected.tensors().items():  # as for a file: memory lies otherwise
        torch.testing.assert_close(back[name], value, rtol=1e-5, atol=1e-5)


def test_the_pretended_device_notices_what_is_left_behind():
    left = torch.ones(3)
    with PretendedDevice() as device:
        there = torch.ones(3, device=device)
        assert (there * 2 + torch.tensor(1.0)).device == device and torch.equal(left.to(there) + there, there * 2)
        for mixed in (lambda: there + left, lambda: left[there.long()], lambda: torch.stack([there, left])):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            np.asarray(there)
        assert there.cpu().numpy().sum() == 3 and there[left.long()].device == device


# ---- the folder


@pytest.mark.newest
def test_the_folder_gives_back_the_same_pipeline(pipeline, saved):
    again, avatar = (p(portrait(), seed=5, max_points=10) for p in (AvatarPipeline.from_pretrained(saved), pipeline))
    for (
        name,
        value,
    ) in avatar.tensors().items():  # weights read from a file lie otherwise in memory: the last bit may differ
        torch.testing.assert_close(again.tensors()[name], value, rtol=1e-5, atol=1e-6)
    card = (saved / "README.md").read_text()
    assert "\nlicense: other\n" in card
    assert card.startswith("---\n") and "![look](images/look.png)" in card and "Untrained: for tests." in card
    assert (saved / "images" / "look.png").is_file()


def test_every_component_loads_alone_from_its_subfolder(saved):
    PointillistForCausalLM.from_pretrained(saved / "point_model")
    GaussianDecoder.from_pretrained(saved / "gaussian_decoder")
    GaussianTokenizer.from_pretrained(saved / "tokenizer")
    HeadModel.load(saved / "head" / "head.safetensors")


def test_the_folder_loads_in_a_clean_interpreter(saved):
    code = (
        "from modeling import AvatarPipeline; import numpy as np\n"
        f"pipeline = AvatarPipeline.from_pretrained({str(saved)!r})\n"
        "print(len(pipeline(np.zeros((20, 20, 3), np.uint8), seed=0, max_points=4)))"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd="/", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 1 <= int(done.stdout) <= 4


def test_saving_again_replaces_the_folder_whole(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "saved", images=[])
    (tmp_path / "saved" / "stale").write_text("")
    pipeline.save_pretrained(tmp_path / "saved")
    assert {path.name for path in tmp_path.iterdir()} == {"saved"}
    assert not (tmp_path / "saved" / "stale").exists()


def test_a_save_that_fails_leaves_what_was_there(pipeline, saved, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path / "saved")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(HeadModel, "save", full)
    with pytest.raises(OSError, match="No space left"):
        pipeline.save_pretrained(tmp_path / "saved")
    assert {path.name for path in tmp_path.iterdir()} == {"saved"}
    AvatarPipeline.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("component", ["tokenizer", "point_model", "gaussian_decoder", "head"])
def test_a_missing_component_is_named(saved, tmp_path, component):
    shutil.copytree(saved, tmp_path / "saved")
    shutil.rmtree(tmp_path / "saved" / component)
    with pytest.raises(FileNotFoundError, match=f"lacks {component};"):
        AvatarPipeline.from_pretrained(tmp_path / "saved")


def test_a_component_without_weights_is_named(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "saved")
    (tmp_path / "saved" / "gaussian_decoder" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="gaussian_decoder"):
        AvatarPipeline.from_pretrained(tmp_path / "saved")


def test_what_is_no_pipeline_is_said(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"has no pipeline\.json"):
        AvatarPipeline.from_pretrained(saved / "point_model")
    with pytest.raises(FileNotFoundError, match="some/repo: no such pipeline"):
        AvatarPipeline.from_pretrained("some/repo")
    shutil.copytree(saved, tmp_path / "saved")
    (tmp_path / "saved" / "pipeline.json").write_text(json.dumps({"format": "another 7"}))
    with pytest.raises(ValueError, match="format 'another 7'"):
        AvatarPipeline.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"point__n_bins": 32}, "32 levels and 600 faces, the tokenizer 16 and 600"),
        ({"tokenizer__token_order": "yzxf"}, "token_order xyzf, the tokenizer yzxf"),
        ({"tokenizer__head_hash": "0123456789abcdef"}, "hash 0123456789abcdef"),
        ({"decoder__point_feature_size": 48}, "width 48, the point model has width 32"),
        ({"decoder__mode": "flame_position"}, "flame_position"),
    ],
)
def test_components_that_do_not_belong_together_are_refused(head, changes, message):
    with pytest.raises(ValueError, match=message):
        AvatarPipeline(**components(head, **changes))


def test_tokenizer_and_point_model_may_share_another_token_order(head):
    orders = {"tokenizer__token_order": "yzxf", "point__token_order": "yzxf"}
    pipeline = AvatarPipeline(**components(head, **orders))
    assert len(pipeline(portrait(), seed=0, candidates=2, max_points=5)) >= 1


def test_a_decoder_of_positions_needs_no_features(head):
    pipeline = AvatarPipeline(**components(head, decoder__mode="position"))
    assert len(pipeline(portrait(), seed=0, max_points=5)) >= 1
