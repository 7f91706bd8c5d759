"""Running the training script as a user does, on the tiny corpus, with the settings of `debug.yaml`."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from gaussian_tokenizer.corpus import Corpus, load_corpus
from training.windows import AvatarRows

ROOT = Path(__file__).parents[2]
DEBUG = ROOT / "training" / "configs" / "debug.yaml"
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
    return AvatarRows(corpus, "train", use_images=True, use_heads=True)


class Launcher:
    """Starts `training/pretrain.py` with `arguments` after the configuration.

    `processes`: "one" by `accelerate launch`, "python" for one without a launcher, or two by torchrun ("ddp") or under
    DeepSpeed ("zero2", "zero3").
    """

    def __init__(self, corpus: Path, cache: Path):
        self.corpus, self.cache = corpus, cache

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
            configuration = ROOT / "training" / "configs" / "accelerate" / f"cpu_{processes}.yaml"
            prefix = [binaries / "accelerate", "launch", "--config_file", configuration, "--main_process_port", "0"]
        command = [*prefix, ROOT / "training" / "pretrain.py", DEBUG, "--corpus", self.corpus, "--output_dir", output]
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
    return Launcher(tiny_corpus, datasets_cache)
