"""`training/train_gaussian_decoder.py` as a user runs it: what it leaves, going on, two processes, and its errors."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from gaussian_tokenizer.corpus.building import build
from gaussian_tokenizer.corpus.options import BuildSettings
from gaussian_tokenizer.heads.procedural_head import build_procedural_head
from modeling import GaussianDecoder
from training import train_gaussian_decoder
from training.common.arguments import exit_on_user_error

STEPS = 12


def history(output: Path) -> list[dict]:
    """What a run logged, without clocks and Trainer's sum at the end, which counts this process's steps only."""
    entries = json.loads((output / "training_log.json").read_text())
    timed = ("runtime", "per_second", "total_flos", "train_loss")
    return [{k: v for k, v in entry.items() if not any(word in k for word in timed)} for entry in entries]


def losses(output: Path) -> list[float]:
    return [entry["loss"] for entry in history(output) if "loss" in entry]


@pytest.fixture(scope="module")
def reference(decoder_launcher, tmp_path_factory) -> Path:
    """The output of one uninterrupted run of one process."""
    output = tmp_path_factory.mktemp("decoder") / "run"
    decoder_launcher.run(output, processes="python")
    return output


@pytest.mark.newest
def test_the_output_folder_loads_and_its_report_holds_what_it_promises(reference):
    decoder = AutoModel.from_pretrained(reference)
    assert isinstance(decoder, GaussianDecoder) and decoder.config.hidden_size == 64
    report = json.loads((reference / "training_report.json").read_text())
    assert report["steps"] == STEPS and report["mode"] == "full"
    assert (report["train_loss_first"], report["train_loss_last"]) == (losses(reference)[0], losses(reference)[-1])
    assert 5 < report["heldout_psnr"] < 60 and 0 < report["heldout_ssim"] < 1
    assert 5 < report["psnr_mean_image"] < 60 and 0 <= report["heldout_coverage"] <= 1
    card = (reference / "README.md").read_text()
    assert card.startswith("---\n") and "PSNR" in card
    assert not [path for path in reference.iterdir() if path.name.startswith(".") or path.name.endswith(".tmp")]


def test_every_part_of_the_loss_is_logged(reference):
    entries = [entry for entry in history(reference) if "loss" in entry]
    assert len(entries) == STEPS
    for entry in entries:
        parts = entry["loss_l1"] + 0.5 * entry["loss_ssim"] + 0.1 * entry["loss_offset"]
        assert entry["loss"] == pytest.approx(parts, abs=2e-3)
        assert "loss_lpips" not in entry


def test_a_run_from_a_checkpoint_ends_with_the_same_bits(decoder_launcher, reference, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    shutil.copytree(reference / "checkpoint-8", output / "checkpoint-8")
    printed = decoder_launcher.run(output, "--resume_from_checkpoint", "true", processes="python")
    assert "checkpoint-8" in printed
    assert history(output) == history(reference)
    assert (output / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()


@pytest.mark.distributed
def test_zero2_on_two_processes_learns_what_one_process_learns(decoder_launcher, reference, tmp_path):
    pytest.importorskip("deepspeed")
    decoder_launcher.run(tmp_path / "run", "--per_device_train_batch_size", "1", processes="zero2")
    assert losses(tmp_path / "run") == pytest.approx(losses(reference), rel=2e-3)
    one, two = (json.loads((run / "training_report.json").read_text()) for run in (reference, tmp_path / "run"))
    assert two["heldout_psnr"] == pytest.approx(one["heldout_psnr"], rel=5e-3)


def test_training_goes_on_from_a_decoder(decoder_launcher, reference, tmp_path):
    decoder_launcher.run(
        tmp_path / "run", "--decoder", str(reference), "--max_steps", "1", "--learning_rate", "0", processes="python"
    )
    first, second = (load_file(folder / "model.safetensors") for folder in (reference, tmp_path / "run"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_decoder_that_reads_the_portrait_is_trained_and_comes_back(decoder_launcher, tmp_path):
    words = ["--read_portrait", "true", "--portrait_channels", "4", "--attention", "portrait", "--max_steps", "2"]
    words += ["--gaussians_per_point", "2", "--num_references", "3"]
    decoder_launcher.run(tmp_path / "run", *words, processes="python")
    config = GaussianDecoder.from_pretrained(tmp_path / "run").config
    assert (config.read_portrait, config.portrait_channels, config.attention) == (True, 4, "portrait")
    assert config.gaussians_per_point == 2 and len(losses(tmp_path / "run")) == 2


# ---- errors


@pytest.fixture
def script(monkeypatch, tmp_path, corpus, point_model):
    """Run the script in this process; returns its one line of error."""
    threads = torch.get_num_threads()
    configuration = Path(train_gaussian_decoder.__file__).parent / "configs" / "decoder_debug.yaml"

    def run(*arguments, **given):
        named = {"corpus": corpus.path, "point_model": point_model, "head": "procedural:600"} | given
        words = ["train_gaussian_decoder.py", configuration, "--output_dir", tmp_path / "run", "--use_cpu", "true"]
        words += [word for name, value in named.items() for word in (f"--{name}", value)]
        monkeypatch.setattr(sys, "argv", [str(word) for word in [*words, *arguments]])
        with pytest.raises(SystemExit) as caught:
            exit_on_user_error(train_gaussian_decoder.main)
        line = str(caught.value)
        assert line.startswith("error: ") and "\n" not in line
        assert not list(tmp_path.glob("run/*"))
        return line

    yield run
    torch.set_num_threads(threads)


def test_lpips_without_its_weights_is_a_clear_choice(script, tmp_path):
    assert "--lpips_weight 0" in script("--lpips_weight", "0.1")
    assert "no such file" in script("--lpips_weight", "0.1", "--lpips_weights", tmp_path / "vgg16.pth")


def test_what_does_not_belong_together_is_named(script):
    assert "made on head model" in script(head="procedural:700")
    assert "mode must be one of full" in script("--mode", "color")
    assert "no such model here" in script(point_model="some/repo")
    assert "animation" in script("--animation", "spline")
    assert "--num_references 2 is for a decoder with --read_portrait true" in script("--num_references", "2")
    assert "--num_references must be at least 1, found 0" in script("--num_references", "0")


def test_a_point_model_of_another_vocabulary_is_refused(script, corpus, tmp_path):
    settings = BuildSettings(n_bins=32, image_size=56, num_validation=4)
    build(corpus.path.parent / "avatars", build_procedural_head(600), tmp_path / "corpus", settings, progress=False)
    line = script(corpus=tmp_path / "corpus")
    assert "64 levels" in line and "32" in line


def test_a_decoder_behind_another_width_is_refused(script, reference, tmp_path):
    config = GaussianDecoder.from_pretrained(reference).config
    config.point_feature_size = 48
    GaussianDecoder(config).save_pretrained(tmp_path / "other")
    assert "of width 48, the point model has width 32" in script("--decoder", tmp_path / "other")
