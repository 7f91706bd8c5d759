"""The training script as users run it: what it leaves, the same losses however it is spread or interrupted, and its errors."""

import contextlib
import json
import math
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import huggingface_hub
import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoProcessor

from gaussian_tokenizer.corpus.building import build
from gaussian_tokenizer.corpus.corpus import load_corpus
from gaussian_tokenizer.corpus.options import BuildSettings
from gaussian_tokenizer.corpus.stats import compute_stats
from gaussian_tokenizer.corpus.validation import validate
from gaussian_tokenizer.heads.procedural_head import build_procedural_head
from training import pretrain
from training.common.arguments import exit_on_user_error
from training.common.exact_trainer import COMPLETE

STEPS, SAVE_EVERY = 16, 3
# A checkpoint every third step, so that a kill falls before, into and after one.
SETTINGS = ("--max_steps", str(STEPS), "--save_steps", str(SAVE_EVERY), "--eval_steps", "5", "--save_total_limit", "2")
# Two processes with one window each learn from the same windows as one process with two.
HALF_BATCH = ("--per_device_train_batch_size", "1")


def history(output: Path) -> list[dict]:
    """The log without what depends on the clock."""
    entries = json.loads((output / "training_log.json").read_text())
    clock = ("tokens_per_second", "mfu", "eval_runtime", "train_runtime")
    return [
        {name: value for name, value in entry.items() if name not in clock and "per_second" not in name}
        for entry in entries
        if "train_runtime" not in entry  # the summary of a resumed run speaks of its own part
    ]


def losses(output: Path) -> list[float]:
    return [entry["loss"] for entry in history(output) if "loss" in entry]


def kill_and_resume(launcher, output: Path, seed: int, *arguments: str, processes: str = "one") -> None:
    """Start a run, kill all of its processes at a random moment after the first checkpoint, run it to the end."""
    moment = random.Random(seed)
    begun = moment.choice(range(SAVE_EVERY, STEPS - 1, SAVE_EVERY))  # the save after which, or during which, it dies
    process = launcher.start(output, *SETTINGS, *arguments, processes=processes)
    deadline = time.monotonic() + 600
    for sign in (output / f"checkpoint-{SAVE_EVERY}" / COMPLETE, output / f"checkpoint-{begun}"):
        while not sign.exists():
            running = process.poll() is None and time.monotonic() < deadline
            assert running, output.with_name(f"{output.name}.log").read_text()
            time.sleep(0.002)
    time.sleep(moment.uniform(0, 0.15))
    # Not the process group: launchers of several processes give each a session of its own.
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(family, timeout=60)
    assert not (output / "training_report.json").exists(), f"over before it was killed, moment {seed}"
    printed = launcher.run(output, *SETTINGS, *arguments, "--resume_from_checkpoint", "true", processes=processes)
    assert re.search(r"resuming from \S+checkpoint-\d+", printed)


@pytest.fixture(scope="module")
def reference(launcher, tmp_path_factory) -> Path:
    """The output of one uninterrupted run of one process."""
    output = tmp_path_factory.mktemp("reference") / "run"
    launcher.run(output, *SETTINGS)
    return output


@pytest.fixture(scope="module")
def zero2(launcher, tmp_path_factory) -> Path:
    """The output of one uninterrupted run of two processes under ZeRO-2."""
    pytest.importorskip("deepspeed")
    output = tmp_path_factory.mktemp("zero2") / "run"
    launcher.run(output, *SETTINGS, *HALF_BATCH, processes="zero2")
    return output


# ---- what a run leaves


def test_the_point_level_trains_resumes_and_generates(launcher, corpus, tmp_path):
    level = ("--level", "point", "--mesh_aware_faces", "true")
    launcher.run(tmp_path / "whole", *SETTINGS, *level)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert (model.config.level, model.config.slot_order, model.config.sliding_window) == ("point", "yfxz", 32)
    report = json.loads((tmp_path / "whole" / "training_report.json").read_text())
    assert report["heldout_nll"] < report["uniform_nll"]
    avatar = corpus.avatars("validation").with_format("numpy")[0]
    faces = build_procedural_head(600).faces
    inputs = corpus.tokenizer(
        images=corpus.frames("validation")[0]["image"],
        head_vertices=avatar["head_vertices"],
        head_faces=faces,
        return_tensors="pt",
    )
    torch.manual_seed(0)
    points = corpus.tokenizer.decode(model.generate(**inputs, max_points=5)[0])
    assert 1 <= len(points["faces"]) <= 5
    # From the checkpoint in the middle on, the losses are those of the whole run.
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for checkpoint in sorted((tmp_path / "again").glob("checkpoint-*"), key=lambda each: int(each.name[11:]))[1:]:
        shutil.rmtree(checkpoint)
    launcher.run(tmp_path / "again", *SETTINGS, *level, "--resume_from_checkpoint", "true")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_corpus_of_another_token_order_is_counted_checked_learned_and_generated(launcher, script, corpus, tmp_path):
    settings = BuildSettings(n_bins=64, image_size=56, num_validation=4, token_order="yzxf")
    build(corpus.path.parent / "avatars", build_procedural_head(600), tmp_path / "corpus", settings, progress=False)
    assert not [problem for verdict in validate(tmp_path / "corpus") for problem in verdict.problems]
    own = load_corpus(tmp_path / "corpus")
    assert compute_stats(own).slot_entropies == compute_stats(corpus).slot_entropies
    assert "tokens `y z x face` a point" in (tmp_path / "corpus" / "README.md").read_text()
    words = ("--corpus", str(tmp_path / "corpus"), "--loss_within_slot", "true", *SETTINGS)
    launcher.run(tmp_path / "model", *words, processes="python")
    report = json.loads((tmp_path / "model" / "training_report.json").read_text())
    assert report["heldout_nll"] < report["uniform_nll"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), own.tokenizer
    assert model.config.token_order == AutoProcessor.from_pretrained(tmp_path / "model").token_order == "yzxf"
    torch.manual_seed(0)
    ids = model.generate(max_points=5)[0]
    points = tokenizer.decode(ids)
    again = tokenizer(points)["input_ids"].tolist()
    assert 1 <= len(points["faces"]) <= 5 and ids[: len(again) - 1].tolist() == again[:-1]
    assert "token_order yzxf, the corpus" in script("--model", tmp_path / "model")
    assert "found token_order 'yzxf'" in script("--level", "point", corpus=tmp_path / "corpus")


@pytest.mark.newest
def test_the_output_folder_loads_and_writes_points(reference, corpus):
    model = AutoModelForCausalLM.from_pretrained(reference)
    tokenizer = AutoProcessor.from_pretrained(reference)
    frame = corpus.frames("validation")[0]["image"]
    avatar = corpus.avatars("validation").with_format("numpy")[0]
    head = build_procedural_head(600)
    inputs = tokenizer(images=frame, head_vertices=avatar["head_vertices"], head_faces=head.faces, return_tensors="pt")
    torch.manual_seed(0)
    points = tokenizer.decode(model.generate(**inputs, max_points=5)[0])
    assert 1 <= len(points["faces"]) <= 5 and points["positions"].shape == (len(points["faces"]), 3)
    assert tokenizer.bounds == corpus.tokenizer.bounds and tokenizer.head_hash == head.hash


@pytest.mark.newest
def test_the_report_holds_what_it_promises(reference, corpus):
    report = json.loads((reference / "training_report.json").read_text())
    splits = corpus.manifest["splits"]
    assert report["num_subjects"] == 12 and report["steps"] == STEPS
    assert report["num_tokens"] == sum(split["num_tokens"] for split in splits.values())
    assert (report["train_loss_first"], report["train_loss_last"]) == (losses(reference)[0], losses(reference)[-1])
    assert report["train_loss_last"] < report["train_loss_first"]
    assert 0 < report["unigram_nll"] < report["uniform_nll"] < report["train_loss_first"]
    for slot in ("", "_x", "_y", "_z", "_face"):
        assert report[f"heldout_perplexity{slot}"] == pytest.approx(math.exp(report[f"heldout_nll{slot}"]))
        assert 0 <= report[f"heldout_accuracy{slot}"] <= 1


def test_the_log_has_losses_speed_and_held_out_slots(reference):
    entries = json.loads((reference / "training_log.json").read_text())
    steps = [entry["step"] for entry in entries if "loss" in entry]
    assert steps == list(range(1, STEPS + 1))
    assert all(entry["tokens_per_second"] > 0 and entry["mfu"] > 0 for entry in entries if "loss" in entry)
    evaluations = [entry for entry in entries if "eval_nll" in entry]
    assert [entry["step"] for entry in evaluations] == [5, 10, 15, STEPS]
    assert evaluations[-1]["eval_nll"] < evaluations[0]["eval_nll"]


def test_the_folder_has_a_card_and_no_leftovers(reference):
    card = (reference / "README.md").read_text()
    assert card.startswith("---\n") and "library_name: transformers" in card and "| face |" in card
    names = {path.name for path in reference.iterdir()}
    assert not {name for name in names if name.startswith(".") or "partial" in name or name.endswith(".tmp")}
    assert {name for name in names if name.startswith("checkpoint-")} == {"checkpoint-15", f"checkpoint-{STEPS}"}


def test_a_checkpoint_explains_itself(reference):
    checkpoint = reference / f"checkpoint-{STEPS}"
    arguments = json.loads((checkpoint / "training_arguments.json").read_text())
    assert arguments["learning_rate"] == 1e-3 and arguments["max_steps"] == STEPS
    assert not [name for name in arguments if "token" in name]
    assert AutoProcessor.from_pretrained(checkpoint).n_bins == 64
    same = load_file(checkpoint / "model.safetensors"), load_file(reference / "model.safetensors")
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[1])


# ---- the same run, interrupted


def test_a_killed_run_goes_on_with_the_same_losses_bit_for_bit(launcher, reference, tmp_path):
    kill_and_resume(launcher, tmp_path / "run", seed=int(time.time()), processes="python")
    assert history(tmp_path / "run") == history(reference)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()


@pytest.mark.distributed
def test_two_killed_processes_under_zero2_go_on_with_the_same_losses_bit_for_bit(launcher, zero2, tmp_path):
    kill_and_resume(launcher, tmp_path / "run", int(time.time()), *HALF_BATCH, processes="zero2")
    assert history(tmp_path / "run") == history(zero2)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (zero2 / "model.safetensors").read_bytes()


def test_a_checkpoint_that_a_killed_save_left_is_passed_over_and_replaced(launcher, reference, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    shutil.copytree(reference / "checkpoint-15", output / "checkpoint-15")
    half = output / f"checkpoint-{STEPS}"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half of a file")
    (half / "left_behind").write_bytes(b"")
    (output / ".model.partial").mkdir()
    (output / ".model.partial" / "left_behind").write_bytes(b"")
    printed = launcher.run(output, *SETTINGS, "--resume_from_checkpoint", "true", processes="python")
    assert re.search(r"resuming from \S+checkpoint-15\b", printed)
    assert history(output) == history(reference)
    assert (half / COMPLETE).exists()
    assert not list(output.rglob("left_behind"))


@pytest.mark.distributed
def test_one_of_two_processes_under_zero2_is_told_to_stop_and_both_save_the_same_step(launcher, zero2, tmp_path):
    output = tmp_path / "run"
    process = launcher.start(output, *SETTINGS, *HALF_BATCH, processes="zero2")
    log = output.with_name(f"{output.name}.log")
    deadline = time.monotonic() + 600
    while not (output / f"checkpoint-{SAVE_EVERY}" / COMPLETE).exists():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    family = psutil.Process(process.pid).children(recursive=True)
    second = next(
        member for member in family if member.environ().get("RANK") == "1" and "LOCAL_RANK" in member.environ()
    )
    second.send_signal(signal.SIGTERM)
    assert process.wait(600) != 0
    said = re.findall(r"(checkpoint-\d+) saved after (\d+) of 16 steps", log.read_text())
    assert len(said) == 1 and (output / said[0][0] / COMPLETE).exists(), log.read_text()
    launcher.run(output, *SETTINGS, *HALF_BATCH, "--resume_from_checkpoint", "true", processes="zero2")
    assert history(output) == history(zero2)
    assert (output / "model.safetensors").read_bytes() == (zero2 / "model.safetensors").read_bytes()


def test_resuming_past_the_last_step_says_that_nothing_is_trained(launcher, reference, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(reference / f"checkpoint-{STEPS}", output / f"checkpoint-{STEPS}")
    half_removed = [output / f"checkpoint-{number}" for number in (1, 2)]  # the process was killed while it did
    for folder in half_removed:
        folder.mkdir()
    words = ("--max_steps", str(STEPS - 1), "--resume_from_checkpoint", "true")
    printed = launcher.run(output, *SETTINGS, *words, processes="python")
    assert f"{STEPS} steps are done and --max_steps is {STEPS - 1}, so nothing is left to train" in printed
    assert (output / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    assert json.loads((output / "training_report.json").read_text())["steps"] == STEPS
    assert sum(folder.exists() for folder in half_removed) == 1, "of three checkpoints two are kept"


# ---- the same run, spread


@pytest.mark.distributed
def test_two_processes_learn_what_one_process_with_twice_the_batch_learns(launcher, reference, tmp_path):
    launcher.run(tmp_path / "run", *SETTINGS, *HALF_BATCH, processes="ddp")
    assert losses(tmp_path / "run") == pytest.approx(losses(reference), rel=1e-4)
    evaluated = [
        [entry["eval_nll"] for entry in history(run) if "eval_nll" in entry] for run in (tmp_path / "run", reference)
    ]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-4)


@pytest.mark.distributed
def test_zero2_learns_what_one_process_learns(zero2, reference):
    assert losses(zero2) == pytest.approx(losses(reference), rel=1e-4)


@pytest.mark.distributed
def test_zero3_learns_what_one_process_learns_and_its_folder_loads(launcher, reference, tmp_path):
    pytest.importorskip("deepspeed")
    launcher.run(tmp_path / "run", *SETTINGS, *HALF_BATCH, processes="zero3")
    assert losses(tmp_path / "run") == pytest.approx(losses(reference), rel=1e-4)
    weights = [load_file(output / "model.safetensors") for output in (tmp_path / "run", reference)]
    assert weights[0].keys() == weights[1].keys()
    # Adam divides by the size of a gradient: where it is nothing but rounding, weights may differ by a step of the rate.
    far = [(weights[0][name] - weights[1][name]).abs().max().item() for name in weights[1]]
    assert max(far) < 1e-2
    reports = [json.loads((output / "training_report.json").read_text()) for output in (tmp_path / "run", reference)]
    assert reports[0]["num_parameters"] == reports[1]["num_parameters"]


# ---- errors


@pytest.fixture
def script(monkeypatch, capsys, tmp_path, corpus):
    """Run the script in this process; returns its one line of error."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    threads = torch.get_num_threads()
    configuration = Path(pretrain.__file__).parent / "configs" / "debug.yaml"

    def run(*arguments, corpus=corpus.path):
        words = ["pretrain.py", configuration, "--corpus", corpus, "--output_dir", tmp_path / "run", "--num_threads", 1]
        words += ["--use_cpu", "true", "--disable_tqdm", "true", *arguments]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        with pytest.raises(SystemExit) as caught:
            exit_on_user_error(pretrain.main)
        line = str(caught.value)
        assert line.startswith("error: ") and "\n" not in line
        return line

    yield run
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("flag", "value"), [("--model", "some/repo"), ("--vision_model", "facebook/dinov2-large")])
def test_a_hub_id_while_offline_is_named_with_its_flag(script, flag, value, tmp_path):
    line = script(flag, value)
    assert f"{flag} {value}: no such model" in line
    assert not list(tmp_path.glob("run/*"))


def test_a_checkpoint_without_weights_is_named(script, reference, tmp_path):
    shutil.copytree(reference, tmp_path / "weightless", ignore=shutil.ignore_patterns("*.safetensors", "checkpoint-*"))
    assert f"--model {tmp_path / 'weightless'}" in script("--model", tmp_path / "weightless")


def test_a_model_of_another_vocabulary_is_refused(script, reference, corpus, tmp_path):
    avatars = corpus.path.parent / "avatars"
    settings = BuildSettings(n_bins=32, image_size=56, num_validation=4)
    build(avatars, build_procedural_head(600), tmp_path / "corpus", settings, progress=False)
    line = script("--model", reference, corpus=tmp_path / "corpus")
    assert "64 levels" in line and "32" in line and "build the corpus with the model's tokenizer" in line


def test_a_corpus_that_is_half_built_or_not_there_is_named(script, corpus, tmp_path):
    (tmp_path / ".corpus.partial").mkdir()
    assert "half-built" in script(corpus=tmp_path / "corpus")
    assert "no such corpus folder" in script(corpus=tmp_path / "nowhere")
    shutil.copytree(corpus.path, tmp_path / "copy")
    shard = next((tmp_path / "copy" / "avatars").iterdir())
    shard.write_bytes(shard.read_bytes()[:-100])
    assert shard.name in script(corpus=tmp_path / "copy")


def test_a_checkpoint_to_resume_that_is_not_there_or_not_whole_is_named(script, reference, tmp_path):
    line = script("--resume_from_checkpoint", tmp_path / "checkpoint-9")
    assert "checkpoint-9: no such folder" in line
    (tmp_path / "checkpoint-9").mkdir()
    assert "not a complete checkpoint" in script("--resume_from_checkpoint", tmp_path / "checkpoint-9")


def test_a_split_that_is_not_there_is_named(script):
    assert "'test'" in script("--eval_split", "test")


def test_a_window_that_is_not_whole_points_is_named(script):
    assert "sliding_window 126 is not a positive multiple of 4" in script("--sliding_window", 126)


def test_a_hub_that_cannot_be_written_to_is_said_before_training(script, tmp_path):
    line = script("--push_to_hub", "true", "--hub_model_id", "me/model")
    assert "--push_to_hub true, but the repository cannot be made" in line and "hf auth login" in line
    assert not list(tmp_path.glob("run/checkpoint-*"))
