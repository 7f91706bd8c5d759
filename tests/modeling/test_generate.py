"""The command that writes a cloud for a portrait: what it leaves, which images it takes, what it says of mistakes."""

import sys

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from plyfile import PlyData
from safetensors.numpy import load_file
from transformers import Dinov2Config

from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.heads.procedural_head import build_procedural_head
from gaussian_tokenizer.synthesize import synthesize
from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer
from gaussian_tokenizer.utils import precision
from modeling import PointillistConfig, PointillistForCausalLM, generate

HEAD = build_procedural_head(600)


def save_model(folder, head_hash=HEAD.hash, **changes):
    torch.manual_seed(0)
    tokenizer = GaussianTokenizer(
        n_bins=32, n_faces=HEAD.n_faces, image_size=28, head_name=HEAD.name, head_hash=head_hash
    )
    config = PointillistConfig(
        n_bins=32, n_faces=HEAD.n_faces, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        head_dim=16, sliding_window=64, point_latents=4, point_hidden_size=16, point_layers=1, point_attention_heads=2,
        vision_config=Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14),
        initializer_range=0.5, **changes,
    )  # fmt: skip
    PointillistForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def command(model, monkeypatch, tmp_path, capsys):
    """Run the command in this process; returns the ids it wrote, or its one line of error."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def run(*arguments, output="out", **flags):
        flags = {"model": model, "head": "procedural:600", "max_points": 6, "device": "cpu"} | flags
        words = [word for name, value in flags.items() for word in (f"--{name}", value)]
        words += [*arguments, "--output_dir", tmp_path / output]
        monkeypatch.setattr(sys, "argv", ["generate", *(str(word) for word in words)])
        try:
            generate.main()
        except SystemExit as error:
            assert error.code == 1
            assert not (tmp_path / output).exists()
            (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
            return line
        return load_file(tmp_path / output / "points.safetensors")["input_ids"]

    return run


@pytest.fixture
def image(tmp_path):
    """Save noise as an image of a mode and a format."""

    def save(mode="RGB", suffix="png", seed=0, size=(40, 30)):
        noise = np.random.default_rng(seed).integers(0, 256, (*size, 4), dtype=np.uint8)
        path = tmp_path / f"portrait-{mode.replace(';', '')}-{seed}.{suffix}"
        Image.fromarray(noise, "RGBA").convert(mode).save(path)
        return path

    return save


def test_it_leaves_points_a_ply_that_opens_and_a_image(command, image, tmp_path):
    ids = command(portrait=image())
    points = load_file(tmp_path / "out" / "points.safetensors")
    again = GaussianTokenizer(n_bins=32, n_faces=HEAD.n_faces).decode(ids)
    assert 1 <= len(points["faces"]) <= 6
    assert np.array_equal(again["faces"], points["faces"])
    vertices = PlyData.read(tmp_path / "out" / "points.ply")["vertex"]
    assert np.array_equal(np.stack([vertices[axis] for axis in "xyz"], 1), points["positions"])
    assert np.array_equal(vertices["face"], points["faces"])
    assert min(Image.open(tmp_path / "out" / "points.png").size) > 50
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"points.safetensors", "points.ply", "points.png"}


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("RGBA", "png"), ("LA", "png"), ("L", "png"), ("P", "gif"), ("1", "png"), ("CMYK", "jpg"), ("L", "jpg")],
)
def test_images_of_every_kind_are_read(command, image, mode, suffix):
    assert len(command(portrait=image(mode, suffix))) > 4


def test_the_same_seed_writes_the_same_cloud_and_another_seed_another(command, image):
    portrait = image()
    first = command(portrait=portrait, seed=1)
    assert np.array_equal(command(portrait=portrait, seed=1), first)
    assert not np.array_equal(command(portrait=portrait, seed=2), first)


def test_the_portrait_and_the_shape_of_the_head_decide(command, image, tmp_path):
    params = HeadParameters.zeros(HEAD.n_shape, HEAD.n_expression)
    params.shape[:] = 3.0
    params.save(tmp_path / "flame_param.npz")
    portrait = image()
    clouds = [
        command(portrait=portrait, temperature=0.05),
        command(portrait=image(seed=1), temperature=0.05),
        command(portrait=portrait, temperature=0.05, params=tmp_path / "flame_param.npz"),
        command(temperature=0.05),
    ]
    assert len({cloud.tobytes() for cloud in clouds}) == 4


def test_a_image_that_is_not_there_or_not_one_is_named(command, tmp_path):
    assert "nobody.png does not exist" in command(portrait=tmp_path / "nobody.png")
    (tmp_path / "text.png").write_text("hello")
    assert "text.png is not a readable image" in command(portrait=tmp_path / "text.png")
    Image.new("RGB", (200, 200), "red").save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    assert "cut.png is not a readable image" in command(portrait=tmp_path / "cut.png")


def test_a_head_that_is_not_the_models_is_refused(command, tmp_path):
    line = command(head="procedural:1200")
    assert "600 faces" not in line.split("--head")[1] and f"{HEAD.n_faces} faces" in line
    other = save_model(tmp_path / "other", head_hash="0" * 16)
    assert "hash 0000000000000000" in command(model=other)
    assert len(command(model=save_model(tmp_path / "unknown", head_hash=None))) > 4


def test_files_that_are_not_there_are_named(command, tmp_path):
    assert "--model some/repo: no model" in command(model="some/repo")
    assert "nobody.npz" in command(params=tmp_path / "nobody.npz")
    assert "nobody.safetensors" in command(head=tmp_path / "nobody.safetensors")


def test_settings_out_of_range_are_said(command):
    assert "max_points" in command(max_points=0)
    assert "max_points_per_face" in command(max_points_per_face=0)


def test_quantized_it_writes_a_valid_cloud_by_compiled_steps(command, image, monkeypatch):
    pytest.importorskip("torchao")
    given = []
    original = PointillistForCausalLM.generate

    def recorded(self, compile_config, **options):
        given.append((type(self.model.layers[0].fc1.weight).__name__, compile_config, options["cache_implementation"]))
        return original(self, **options)

    monkeypatch.setattr(PointillistForCausalLM, "generate", recorded)
    assert len(command(portrait=image(), quantize="int8", dtype="bfloat16")) > 4
    ((weight, compile_config, cache),) = given
    assert (weight, cache) == ("Int8Tensor", "static") and compile_config._compile_all_devices


@pytest.mark.slow
def test_quantized_steps_compile(command, image):
    pytest.importorskip("torchao")
    assert len(command(portrait=image(), quantize="int8")) > 4


def test_without_torchao_it_says_what_to_install(command, image, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    assert 'pip install "avatar-pointillist[quantized]"' in command(portrait=image(), quantize="int8")


def test_the_precision_is_that_of_the_device_or_the_flag(command, image, monkeypatch, capsys):
    seen = []
    original = PointillistForCausalLM.generate
    monkeypatch.setattr(
        PointillistForCausalLM, "generate", lambda self, **kw: seen.append(self.dtype) or original(self, **kw)
    )
    for fast, dtype in ((True, None), (True, "auto"), (False, "auto"), (False, "bfloat16"), (True, "float32")):
        monkeypatch.setattr(precision, "supports_bf16", lambda device, fast=fast: fast)
        command(portrait=image(), **({"dtype": dtype} if dtype else {}))
    assert seen == [torch.float32, torch.bfloat16, torch.float32, torch.bfloat16, torch.float32]
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert notes == [
        "note: bfloat16 (--dtype auto: this CPU has AMX or AVX-512 bf16)",
        "note: float32 (--dtype auto: this CPU has neither AMX nor AVX-512 bf16)",
        "note: bfloat16 (--dtype bfloat16: slow, this CPU has neither AMX nor AVX-512 bf16)",
    ]


def test_a_model_that_reads_the_portrait_at_its_faces_takes_a_tracked_subject(command, image, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reading")
    (subject,) = synthesize(
        folder / "subjects", 1, "procedural:600", num_points=60, views=2, timesteps=1, image_size=56
    )
    reading = {"level": "point", "mesh_aware_faces": True, "read_portrait": True}
    model = save_model(folder / "model", **reading)
    found = command(model=model, tracking=subject)
    assert len(found) > 1 and (found == command(model=model, tracking=subject, output="again")).all()
    with pytest.warns(UserWarning, match="no camera was given"):
        command(model=model, portrait=image(), output="framed")
    assert "give --tracking" in command(model=model, output="blind")
    assert "leave --portrait and --params out" in command(
        model=model, tracking=subject, portrait=image(), output="both"
    )
    assert "nowhere" in command(model=model, tracking=folder / "nowhere", output="none")
    only_faces = save_model(folder / "faces", **reading, use_vision_encoder=False, use_point_encoder=False)
    assert len(command(model=only_faces, tracking=subject, output="faces")) > 1
