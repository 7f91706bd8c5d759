"""A tiny pipeline, three subjects to run the bench on, and one run of it."""

from pathlib import Path

import pytest
import torch
from bench import run_bench
from transformers import Dinov2Config

from eval.reenactment.clips import Clip, open_dataset
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.procedural_head import build_procedural_head
from gaussian_tokenizer.synthesize import synthesize
from gaussian_tokenizer.synthetic.source import PLAIN
from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer
from modeling import AvatarPipeline, GaussianDecoder, GaussianDecoderConfig, PointillistConfig, PointillistForCausalLM

VISION = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=28)


@pytest.fixture(scope="session")
def bench_head() -> HeadModel:
    return build_procedural_head(600)


@pytest.fixture(scope="session")
def subjects(tmp_path_factory) -> Path:
    """Three subjects, four timesteps, two cameras, images of 32 pixels."""
    folder = tmp_path_factory.mktemp("subjects")
    settings = {"num_points": 40, "views": 2, "timesteps": 4, "seed": 5, "placement": "regular"} | PLAIN
    synthesize(folder, num_subjects=3, image_size=32, **settings)
    return folder


@pytest.fixture(scope="session")
def clips(subjects, bench_head) -> list[Clip]:
    return open_dataset(subjects, bench_head, camera=0)


@pytest.fixture(scope="session")
def bench_pipeline(bench_head) -> AvatarPipeline:
    """Untrained, but with large weights: its avatars differ between subjects."""
    torch.manual_seed(0)
    tokenizer = GaussianTokenizer(
        n_bins=16, n_faces=600, bounds=[[-0.2, -0.3, -0.2], [0.2, 0.2, 0.2]], image_size=28,
        head_name=bench_head.name, head_hash=bench_head.hash,
    )  # fmt: skip
    point = PointillistConfig(
        n_bins=16, n_faces=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
        sliding_window=64, vision_config=Dinov2Config(**VISION), point_latents=4, point_hidden_size=16, point_layers=1,
        point_attention_heads=2, initializer_range=0.2,
    )  # fmt: skip
    models = PointillistForCausalLM(point), GaussianDecoder(decoder_config("full"))
    return AvatarPipeline(tokenizer, *models, bench_head)


def decoder_config(mode: str) -> GaussianDecoderConfig:
    return GaussianDecoderConfig(
        mode=mode, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, point_feature_size=32,
        vision_config=Dinov2Config(**VISION), initializer_range=0.2,
    )  # fmt: skip


@pytest.fixture(scope="session")
def flame_position() -> GaussianDecoder:
    torch.manual_seed(1)
    return GaussianDecoder(decoder_config("flame_position")).eval()


@pytest.fixture(scope="session")
def pipeline_folder(bench_pipeline, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "pipeline"
    bench_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bench_words(pipeline_folder, subjects) -> list[str]:
    """The command line of a run, but for its output."""
    words = ["--model", str(pipeline_folder), "--dataset", str(subjects), "--max_points", "12", "--batch_size", "2"]
    return [*words, "--seed", "3", "--camera", "0"]


@pytest.fixture(scope="session")
def finished(bench_words, tmp_path_factory) -> Path:
    """The folder of a run of both modes, from start to end."""
    output = tmp_path_factory.mktemp("bench") / "out"
    run_bench(bench_words, output)
    return output
