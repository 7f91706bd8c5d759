"""Everything that goes to the Hub, to a stand-in for it on the loopback and back: pushed with the toolkit, loaded without it.

Each process has the real clients (huggingface_hub, transformers, datasets) and speaks plain HTTP to `hub_stub`.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hub_stub import HubStub
from paths import ROOT
from transformers import Dinov2Config

from gaussian_tokenizer.corpus.corpus import load_corpus
from gaussian_tokenizer.heads.procedural_head import build_procedural_head
from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer
from modeling import AvatarPipeline, GaussianDecoder, GaussianDecoderConfig, PointillistConfig, PointillistForCausalLM

pytestmark = pytest.mark.slow

TOOLKIT = ("gaussian_tokenizer", "modeling", "training", "eval")
VISION = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=28)

PUSH = """
import json, sys
import torch
from gaussian_tokenizer.build_corpus import main as build_corpus
from gaussian_tokenizer.corpus.corpus import load_corpus
from gaussian_tokenizer.utils.hub import upload
from modeling import AvatarPipeline

folder, avatars, corpus = sys.argv[1:]
pipeline = AvatarPipeline.from_pretrained(folder)
address = pipeline.push_to_hub("me/pipeline", license="cc-by-4.0", private=True)
pipeline.point_model.push_to_hub("me/model")
pipeline.tokenizer.push_to_hub("me/model")
pipeline.gaussian_decoder.push_to_hub("me/decoder")
again = AvatarPipeline.from_pretrained("me/pipeline")
for name in ("point_model", "gaussian_decoder"):
    own, other = getattr(pipeline, name).state_dict(), getattr(again, name).state_dict()
    assert own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own)
assert again.head.hash == pipeline.head.hash and again.tokenizer.bounds == pipeline.tokenizer.bounds
pipeline.point_model.to(torch.bfloat16).push_to_hub("me/half")
pipeline.gaussian_decoder.to(torch.bfloat16).push_to_hub("me/half-decoder")

words = ["--avatars", avatars, "--head", "procedural:600", "--output_dir", corpus, "--n_bins", "64", "--image_size", "56"]
assert build_corpus([*words, "--num_validation", "4", "--push_to_hub", "me/corpus"]) == 0
rows = load_corpus("hf://datasets/me/corpus").avatars("train")
try:
    upload(folder, "me/refused", token="hf_wrong")
    refused = ""
except ConnectionError as error:
    refused = str(error)
print(json.dumps({"address": address, "corpus": {row["avatar_id"]: list(row["input_ids"]) for row in rows}, "refused": refused}))
"""

LOAD = """
import hashlib, json, sys
for name in %r:
    sys.modules[name] = None  # importing it fails, however it is installed
import torch
from datasets import load_dataset
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor

def digest(model):
    state = {name: value.contiguous().view(-1).view(torch.uint8) for name, value in model.state_dict().items()}
    return hashlib.sha256(b"".join(name.encode() + state[name].numpy().tobytes() for name in sorted(state))).hexdigest()

def load(auto, *where, **options):
    return auto.from_pretrained(*where, trust_remote_code=True, **options)

found = {
    "model": digest(load(AutoModelForCausalLM, "me/model")),
    "bare decoder of the model": digest(load(AutoModel, "me/model")),
    "decoder": digest(load(AutoModel, "me/decoder")),
    "half": digest(load(AutoModelForCausalLM, "me/half")),
    "half-decoder": digest(load(AutoModel, "me/half-decoder")),
    "pipeline/point_model": digest(load(AutoModelForCausalLM, "me/pipeline", subfolder="point_model")),
    "pipeline/gaussian_decoder": digest(load(AutoModel, "me/pipeline", subfolder="gaussian_decoder")),
    "folder/point_model": digest(load(AutoModelForCausalLM, sys.argv[1], subfolder="point_model")),
    "subfolder alone": digest(load(AutoModel, sys.argv[1] + "/gaussian_decoder")),
    "trained": digest(load(AutoModelForCausalLM, "me/trained")),
}
tokenizers = [load(AutoProcessor, "me/model"), load(AutoProcessor, "me/pipeline", subfolder="tokenizer")]
tokenizers += [load(AutoProcessor, "me/trained")]
rows = load_dataset("me/corpus", "avatars", split="train")
found["tokenizers"] = [[own.n_bins, own.n_faces, own.bounds] for own in tokenizers]
found["corpus"] = {row["avatar_id"]: row["input_ids"] for row in rows}
print(json.dumps(found))
"""


def digest(model: torch.nn.Module) -> str:
    """Of names, dtypes' bytes and values of all weights."""
    state = {name: value.contiguous().view(-1).view(torch.uint8) for name, value in model.state_dict().items()}
    return hashlib.sha256(b"".join(name.encode() + state[name].numpy().tobytes() for name in sorted(state))).hexdigest()


def python(hub: HubStub, home: Path, *words: str | Path) -> str:
    """What a fresh interpreter prints, online with the stub; `home` is its cache."""
    home.mkdir(parents=True, exist_ok=True)
    environment = hub.environment(home) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    assert not hub.unknown, "asked of the stub, which does not know it"
    return done.stdout


@pytest.fixture(scope="module")
def hub():
    with HubStub() as hub:
        yield hub


@pytest.fixture(scope="module")
def pipeline() -> AvatarPipeline:
    torch.manual_seed(0)
    head = build_procedural_head(600)
    tokenizer = GaussianTokenizer(n_bins=16, n_faces=600, image_size=28, head_name=head.name, head_hash=head.hash)
    point = PointillistConfig(
        n_bins=16, n_faces=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
        sliding_window=64, vision_config=Dinov2Config(**VISION), point_latents=4, point_hidden_size=16, point_layers=1,
        point_attention_heads=2,
    )  # fmt: skip
    decoder = GaussianDecoderConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, point_feature_size=32, vision_config=Dinov2Config(**VISION)
    )  # fmt: skip
    return AvatarPipeline(tokenizer, PointillistForCausalLM(point), GaussianDecoder(decoder), head)


@pytest.fixture(scope="module")
def pushed(hub, pipeline, tiny_corpus, tmp_path_factory) -> dict:
    """What the process said that pushed the pipeline, its components in two precisions, and a corpus."""
    folder = tmp_path_factory.mktemp("push")
    pipeline.save_pretrained(folder / "pipeline")
    words = [folder / "pipeline", tiny_corpus.parent / "avatars", folder / "corpus"]
    return json.loads(python(hub, folder / "home", "-c", PUSH, *words).splitlines()[-1]) | {"folder": folder}


@pytest.fixture(scope="module")
def trained(hub, tiny_corpus, tmp_path_factory) -> tuple[str, Path]:
    """What a training with `--push_to_hub true` printed, and its output folder, in which something else lay before."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "run").mkdir()
    (folder / "run" / "diary.txt").write_text("private")
    options = dict(corpus=tiny_corpus, output_dir=folder / "run", push_to_hub="true", hub_model_id="me/trained")
    options |= dict(max_steps=2, save_steps=2, eval_steps=2, disable_tqdm="true", num_threads=1, use_cpu="true")
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    script = ROOT / "training" / "pretrain.py"
    return python(hub, folder / "home", script, script.parent / "configs" / "debug.yaml", *words), folder / "run"


@pytest.fixture(scope="module")
def loaded(hub, pushed, trained, tmp_path_factory) -> dict:
    """What a process without the toolkit, and with an empty cache, loaded of all that."""
    home, folder = tmp_path_factory.mktemp("bare") / "home", pushed["folder"] / "pipeline"
    return json.loads(python(hub, home, "-c", LOAD % (TOOLKIT,), folder).splitlines()[-1])


def card_header(hub: HubStub, name: str, kind: str = "models") -> dict:
    return yaml.safe_load(hub.files(name, kind)["README.md"].decode().split("---\n")[1])


def test_pushed_models_load_without_the_toolkit_with_equal_weights(pipeline, loaded):
    assert loaded["model"] == digest(pipeline.point_model)
    assert loaded["decoder"] == digest(pipeline.gaussian_decoder)


def test_auto_model_is_the_bare_decoder_of_the_point_model(pipeline, loaded):
    assert loaded["bare decoder of the model"] == digest(pipeline.point_model.model)


def test_every_component_of_a_pushed_pipeline_loads_by_id_and_subfolder(pipeline, loaded):
    assert loaded["pipeline/point_model"] == digest(pipeline.point_model)
    assert loaded["pipeline/gaussian_decoder"] == digest(pipeline.gaussian_decoder)
    assert loaded["folder/point_model"] == loaded["pipeline/point_model"]
    assert loaded["subfolder alone"] == loaded["pipeline/gaussian_decoder"]
    own = pipeline.tokenizer
    assert loaded["tokenizers"][:2] == [[own.n_bins, own.n_faces, own.bounds]] * 2


def test_weights_in_bfloat16_come_back_as_they_were(pipeline, loaded):
    for name, model in (("half", PointillistForCausalLM), ("half-decoder", GaussianDecoder)):
        own = pipeline.point_model if model is PointillistForCausalLM else pipeline.gaussian_decoder
        half = model(own.config)
        half.load_state_dict(own.state_dict())
        assert loaded[name] == digest(half.to(torch.bfloat16))


def test_a_training_pushes_its_model_and_nothing_else_and_says_where(hub, trained, loaded):
    printed, folder = trained
    assert f"uploaded: {hub.url}/me/trained\n" in printed
    assert loaded["trained"] == digest(PointillistForCausalLM.from_pretrained(folder))
    tokenizer = GaussianTokenizer.from_pretrained(folder)
    assert loaded["tokenizers"][2] == [tokenizer.n_bins, tokenizer.n_faces, tokenizer.bounds]
    there = set(hub.files("me/trained"))
    assert {"config.json", "model.safetensors", "processor_config.json", "README.md", "training_report.json"} <= there
    assert (folder / "training_args.bin").is_file() and list(folder.glob("checkpoint-*"))
    assert not there & {"training_args.bin", "diary.txt"} and not any("checkpoint" in path for path in there)


def test_a_pushed_corpus_opens_with_datasets_alone_and_by_its_url(hub, pushed, loaded):
    rows = load_corpus(pushed["folder"] / "corpus").avatars("train")
    own = {row["avatar_id"]: list(row["input_ids"]) for row in rows}
    assert len(own) == 8 and pushed["corpus"] == own and loaded["corpus"] == own
    assert card_header(hub, "me/corpus", "datasets")["license"] == "cc0-1.0"


def test_a_pushed_pipeline_says_its_address_and_license_and_is_private_if_asked(hub, pushed):
    assert pushed["address"] == f"{hub.url}/me/pipeline"
    assert hub.repositories["models", "me/pipeline"].private
    header = card_header(hub, "me/pipeline")
    assert header["license"] == "cc-by-4.0" and header["pipeline_tag"] == "image-to-3d"


def test_a_trained_model_has_the_license_of_its_corpus(hub, trained):
    header = card_header(hub, "me/trained")
    assert header["license"] == "cc0-1.0" and header["library_name"] == "transformers"


def test_a_refused_upload_says_in_one_line_how_to_do_it_later(pushed):
    said = pushed["refused"]
    assert "\n" not in said and "was not uploaded to 'me/refused'" in said and "401" in said
    assert "upload it with: hf upload me/refused " in said
