"""Running the training scripts as a user does, on the tiny corpus, with their settings for debugging."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from paths import ROOT
from transformers import Dinov2Config

from gaussian_tokenizer.corpus.corpus import Corpus, load_corpus
from modeling import PointillistConfig, PointillistForCausalLM
from training.common.rows import CONDITION, AvatarRows

DEBUG = ROOT / "training" / "configs" / "debug.yaml"
DECODER_DEBUG = DEBUG.with_name("decoder_debug.yaml")
# The first DeepSpeed run of a machine compiles a small C++ extension, which takes minutes.
TIMEOUT = 600


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory) -> Path:
    """Neither these tests nor the processes they start leave anything in the user's cache."""
    cache = tmp_path_factory.getbasetemp() / "datasets_cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        yield cache


@pytest.fixture(scope="session")
def corpus(tiny_corpus, datasets_cache) -> Corpus:
    return load_corpus(tiny_corpus)


@pytest.fixture(scope="session")
def train_rows(corpus) -> AvatarRows:
    return AvatarRows(corpus, "train", CONDITION[:3])


class Launcher:
    """Starts a training script with `arguments` after its configuration.

    `processes`: "one" by `accelerate launch`, "python" for one without a launcher, or two by torchrun ("ddp") or under
    DeepSpeed ("zero2", "zero3", with further flags of the launcher behind).
    """

    def __init__(self, cache: Path, *words: str | Path):
        self.cache, self.words = cache, words

    def start(self, output: Path, *arguments: str, processes: str = "one") -> subprocess.Popen:
        binaries = Path(sys.executable).parent
        if processes == "ddp":
            with socket.socket() as free:
                free.bind(("", 0))
                port = free.getsockname()[1]
            prefix = [binaries / "torchrun", "--nproc_per_node", "2", "--master_port", str(port)]
        elif processes == "python":
            prefix = [sys.executable]
        elif processes == "one":
            prefix = [binaries / "accelerate", "launch", "--num_processes", "1", "--num_machines", "1"]
            prefix += ["--mixed_precision", "no", "--dynamo_backend", "no"]
        else:
            name, *flags = processes.split()
            configuration = ROOT / "training" / "configs" / "accelerate" / f"cpu_{name}.yaml"
            prefix = [binaries / "accelerate", "launch", "--config_file", configuration]
            prefix += ["--main_process_port", "0", *flags]
        command = [*prefix, *self.words, "--output_dir", output]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(self.cache),
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(output.with_name(f"{output.name}.log"), "a") as log:
            return subprocess.Popen(
                [str(word) for word in (*command, "--num_threads", "1", "--disable_tqdm", "true", *arguments)],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self, output: Path, *arguments: str, processes: str = "one") -> str:
        """Run to the end and return what was printed; fails the test if the run failed."""
        process = self.start(output, *arguments, processes=processes)
        status = process.wait(TIMEOUT)
        printed = output.with_name(f"{output.name}.log").read_text()
        assert status == 0, printed[-6000:]
        return printed


@pytest.fixture(scope="session")
def launcher(tiny_corpus, datasets_cache) -> Launcher:
    return Launcher(datasets_cache, ROOT / "training" / "pretrain.py", DEBUG, "--corpus", tiny_corpus)


@pytest.fixture(scope="session")
def point_model(corpus, tmp_path_factory) -> Path:
    """Folder of an untrained point model for the tiny corpus, with both encoders of its condition."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("point") / "model"
    tokenizer = corpus.tokenizer
    vision = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=56)
    config = PointillistConfig(
        n_bins=tokenizer.n_bins, n_faces=tokenizer.n_faces, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, head_dim=16, sliding_window=64, vision_config=vision, freeze_vision_encoder=False,
        point_latents=4, point_hidden_size=16, point_layers=1, point_attention_heads=2, initializer_range=0.1,
    )  # fmt: skip
    PointillistForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def decoder_launcher(tiny_corpus, point_model, datasets_cache) -> Launcher:
    """Starts the training of a Gaussian decoder behind that point model."""
    script = ROOT / "training" / "train_gaussian_decoder.py"
    words = ["--corpus", tiny_corpus, "--point_model", point_model, "--head", "procedural:600"]
    return Launcher(datasets_cache, script, DECODER_DEBUG, *words)
