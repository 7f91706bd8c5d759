"""The precision of a training: what `--bf16 auto` chooses and says, how close bfloat16 comes, and what a resumed run does."""

import json
import sys
from pathlib import Path

import pytest
import torch

from gaussian_tokenizer.utils import precision
from training import pretrain
from training.common.arguments import exit_on_user_error
from training.common.training_arguments import PretrainArguments


@pytest.fixture(autouse=True)
def number_of_threads():
    """Arguments set it for the process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cpu(monkeypatch):
    """Make the CPU one with or without bfloat16."""
    return lambda fast: monkeypatch.setattr(precision, "supports_bf16", lambda device: fast)


def chosen(tmp_path, **arguments) -> tuple[bool, str, str]:
    made = PretrainArguments(output_dir=str(tmp_path), use_cpu=True, max_steps=1, **arguments)
    return made.bf16, made.mixed_precision, made.precision_reason


def test_auto_asks_the_cpu(cpu, tmp_path):
    cpu(True)
    assert chosen(tmp_path, bf16="auto") == (True, "bf16", "--bf16 auto: this CPU has AMX or AVX-512 bf16")
    assert chosen(tmp_path, bf16=True) == (True, "bf16", "--bf16 true")
    assert chosen(tmp_path) == (False, "no", "--bf16 false")
    cpu(False)
    assert chosen(tmp_path, bf16="auto") == (False, "no", "--bf16 auto: this CPU has neither AMX nor AVX-512 bf16")
    assert chosen(tmp_path, bf16=True)[::2] == (True, "--bf16 true: slow, this CPU has neither AMX nor AVX-512 bf16")


def test_the_check_takes_missing_functions_for_no(monkeypatch):
    names = list(precision.CPU_CHECKS.values())
    for name in names:
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert not precision.supports_bf16("cpu")
    monkeypatch.setattr(torch.cpu, names[1], lambda: True)
    assert precision.supports_bf16("cpu")
    for name in names:
        monkeypatch.delattr(torch.cpu, name)
    assert not precision.supports_bf16(torch.device("cpu")) and not precision.supports_bf16("meta")


def test_auto_follows_a_launcher_that_sets_the_precision(cpu, tmp_path, monkeypatch):
    cpu(False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for asked in ("auto", False):
        assert chosen(tmp_path, bf16=asked) == (asked == "auto", "bf16", "the configuration of the launcher")


@pytest.mark.distributed
def test_deepspeed_on_cpus_trains_in_the_precision_of_its_launcher(launcher, tmp_path):
    pytest.importorskip("deepspeed")
    launched = "zero2 --mixed_precision bf16"
    launcher.run(tmp_path / "run", "--max_steps", "2", "--bf16", "auto", processes=launched)
    report = json.loads((tmp_path / "run" / "training_report.json").read_text())
    assert (report["precision"], report["precision_reason"]) == ("bfloat16", "the configuration of the launcher")


def test_deepspeed_keeps_its_precision(cpu, tmp_path, monkeypatch):
    cpu(True)
    with pytest.raises(ValueError, match="--bf16 auto: the file of --deepspeed sets the precision"):
        PretrainArguments(output_dir=str(tmp_path), bf16="auto", deepspeed="ds.json")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match=r"accelerate launch --mixed_precision bf16, or .* --bf16 auto"):
        PretrainArguments(output_dir=str(tmp_path), bf16=True)
    arguments = PretrainArguments.__new__(PretrainArguments)
    arguments.bf16, arguments.deepspeed = "auto", None
    arguments.choose_precision()
    assert (arguments.bf16, arguments.precision_reason) == (False, "the configuration of the launcher")


@pytest.fixture
def run(corpus, monkeypatch, capsys, tmp_path):
    """Run the pre-training in this process; returns the report, or its line of error, and what it printed."""

    def run(*arguments):
        words = ["pretrain.py", "debug", "--corpus", corpus.path, "--output_dir", tmp_path / "run", "--num_threads", 1]
        words += ["--use_cpu", "true", "--disable_tqdm", "true", "--save_steps", 2, *arguments]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        try:
            exit_on_user_error(pretrain.main)
        except SystemExit as error:
            return str(error), ""
        printed = capsys.readouterr()
        return json.loads((tmp_path / "run" / "training_report.json").read_text()), printed.out + printed.err

    return run


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((folder / "training_log.json").read_text()) if "loss" in entry]


def test_bfloat16_stays_close_to_float32_and_a_resumed_run_does_not_change_silently(run, cpu, tmp_path):
    cpu(False)
    report, printed = run("--max_steps", 4, "--bf16", "auto")
    assert report["precision"] == "float32" and report["precision_reason"].startswith(
        "--bf16 auto: this CPU has neither"
    )
    assert printed.count("float32 (--bf16 auto: this CPU has neither AMX nor AVX-512 bf16)") == 1
    exact = losses(tmp_path / "run")

    cpu(True)
    report, _ = run("--max_steps", 4, "--bf16", "auto")
    assert report["precision"] == "bfloat16"
    assert losses(tmp_path / "run") == pytest.approx(exact, rel=2e-2) and losses(tmp_path / "run") != exact

    cpu(False)
    again = ("--max_steps", 6, "--resume_from_checkpoint", "true")
    line, _ = run(*again, "--bf16", "auto")
    assert "checkpoint-4 was trained in bfloat16, but would go on in float32 (--bf16 auto: this CPU has nei" in line
    assert "give --bf16 true to go on as before, or --bf16 false to change the precision" in line
    report, printed = run(*again, "--bf16", "false")
    assert report["precision"] == "float32" and len(losses(tmp_path / "run")) == 6
    assert "warning: " in printed and "was trained in bfloat16, but would go on in float32 (--bf16 false)" in printed
    report, printed = run("--max_steps", 8, "--resume_from_checkpoint", "true", "--bf16", "auto")
    assert report["precision"] == "float32" and "was trained in" not in printed
