"""The trainer in this process: evaluation against a plain forward pass, checkpoints that are whole or not there."""

import errno
import json
import math
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from curves import assert_pinned
from safetensors import SafetensorError

from gaussian_tokenizer.utils.disk import disk_is_full
from modeling import PointillistConfig, PointillistForCausalLM
from training.common import exact_trainer
from training.common.arguments import parse_arguments
from training.common.exact_trainer import COMPLETE, checkpoint_to_resume, steps_ahead
from training.common.process import Interrupted
from training.common.rows import HEAD_COLUMNS, AvatarRows
from training.common.training_arguments import PretrainArguments
from training.pretraining import trainer as trainer_module
from training.pretraining.metrics import slot_metrics
from training.pretraining.trainer import PointillistTrainer
from training.pretraining.windows import EvaluationWindows, TrainWindows, collate_windows


@pytest.fixture(autouse=True)
def number_of_threads():
    """Arguments set it for the process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_trainer(corpus, tmp_path):
    """A trainer of a small model with a mesh encoder; `window` tokens, other arguments to `PretrainArguments`."""

    def make(window=64, max_steps=4, **arguments) -> PointillistTrainer:
        torch.manual_seed(0)
        tokenizer = corpus.tokenizer
        config = PointillistConfig(
            n_bins=tokenizer.n_bins, n_faces=tokenizer.n_faces, hidden_size=32, intermediate_size=64,
            num_hidden_layers=1, num_attention_heads=2, head_dim=16, sliding_window=window, use_vision_encoder=False,
            point_latents=4, point_hidden_size=16, point_layers=1, point_attention_heads=2, initializer_range=0.1,
        )  # fmt: skip
        train, heldout = (AvatarRows(corpus, split, HEAD_COLUMNS) for split in ("train", "validation"))
        settings = {
            "output_dir": str(tmp_path / "run"), "max_steps": max_steps, "save_steps": 1, "eval_strategy": "no",
            "per_device_train_batch_size": 2, "per_device_eval_batch_size": 3, "logging_steps": 1, "use_cpu": True,
            "disable_tqdm": True, "warmup_steps": 0, "num_threads": 1,
        }  # fmt: skip
        return PointillistTrainer(
            model=PointillistForCausalLM(config),
            args=PretrainArguments(**(settings | arguments)),
            train_dataset=TrainWindows(train, window, 2 * max_steps, 0, 0.1),
            eval_dataset=EvaluationWindows(heldout, window),
            data_collator=partial(collate_windows, pad_token_id=config.pad_token_id),
        )

    return make


def full_forward(model, rows) -> dict[str, float]:
    """Slot metrics from one forward pass over each whole sequence, token by token."""
    sums = torch.zeros(3, 4, dtype=torch.double)
    model.eval()
    for row in range(len(rows)):
        ids = torch.from_numpy(rows.sequence(row))
        condition = {name: torch.from_numpy(value.copy())[None] for name, value in rows.condition(row, None).items()}
        with torch.no_grad():
            logits = model(input_ids=ids[None], **condition).logits[0].double()
        for t in range(1, len(ids)):
            scores = logits[t - 1]
            sums[:, (t - 1) % 4] += torch.stack(
                (-F.log_softmax(scores, -1)[ids[t]], (scores.argmax() == ids[t]).double(), torch.ones(()).double())
            )
    return {f"eval_{name}": value for name, value in slot_metrics(sums).items()}


@pytest.mark.newest
def test_evaluation_is_a_plain_forward_pass_where_sequences_fit_the_window(make_trainer):
    trainer = make_trainer(window=1024)
    rows = trainer.eval_dataset.rows
    assert rows.lengths.max() <= 1024 and len(set(rows.lengths)) > 1
    expected, found = full_forward(trainer.model, rows), trainer.evaluate()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name
    assert found["eval_loss"] == found["eval_nll"]


def test_evaluation_with_a_window_counts_every_token_once(make_trainer):
    trainer = make_trainer(window=64)
    seen = torch.zeros(3, 4, dtype=torch.double)
    original = trainer_module.slot_sums

    def spy(logits, labels, config):
        sums = original(logits, labels, config)
        seen.add_(sums.sum(0))
        return sums

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "slot_sums", spy)
        found = trainer.evaluate()
    rows = trainer.eval_dataset.rows
    assert seen[2].sum() == (rows.lengths - 1).sum()
    assert seen[2].tolist() == [rows.lengths.sum() // 4 - len(rows) // 2 + len(rows)] + [sum(rows.lengths - 2) // 4] * 3
    assert found["eval_nll"] == pytest.approx(float(seen[0].sum() / seen[2].sum()))


def nll_of_windows(trainer, condition_of=lambda row: row, context=lambda ids: ids) -> float:
    """Nats a token from one forward pass a window, under the condition of a row and with a changed context."""
    rows, nll, count = trainer.eval_dataset.rows, 0.0, 0
    trainer.model.eval()
    for row, start, known in trainer.eval_dataset.items:
        ids = torch.from_numpy(rows.sequence(row)[start : start + 64])
        read = torch.cat((context(ids[:known]), ids[known:]))
        condition = {n: torch.from_numpy(v.copy())[None] for n, v in rows.condition(condition_of(row), None).items()}
        with torch.no_grad():
            logits = trainer.model(input_ids=read[None], **condition).logits[0].double()
        first = max(known, 1)
        nll += float(F.cross_entropy(logits[first - 1 : -1], ids[first:], reduction="sum"))
        count += len(ids) - first
    assert count == (rows.lengths - 1).sum()
    return nll / count


def test_evaluation_with_a_window_reads_the_subjects_condition_and_the_tokens_before(make_trainer):
    trainer = make_trainer(window=64)
    found = trainer.evaluate()["eval_nll"]
    assert found == pytest.approx(nll_of_windows(trainer), rel=1e-5)
    count = len(trainer.eval_dataset.rows)
    for wrong in ({"condition_of": lambda row: (row + 1) % count}, {"context": lambda ids: ids.roll(1)}):
        assert abs(nll_of_windows(trainer, **wrong) / found - 1) > 1e-4


def test_evaluation_leaves_training_as_it_was(make_trainer, tmp_path):
    with_evaluation = make_trainer(eval_strategy="steps", eval_steps=1, output_dir=str(tmp_path / "a"))
    with_evaluation.train()
    without = make_trainer(output_dir=str(tmp_path / "b"))
    without.train()
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (with_evaluation, without)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_speed_is_that_of_learned_tokens(make_trainer, monkeypatch):
    clock = iter(range(10**6))
    trainer = make_trainer(window=64, max_steps=3)
    monkeypatch.setattr(trainer_module.time, "perf_counter", lambda: float(next(clock)))
    trainer.last_log = -1.0
    trainer.train()
    items = [trainer.train_dataset[i] for i in range(6)]
    learned = [sum(len(item["labels"]) - 1 for item in items[2 * k : 2 * k + 2]) for k in range(3)]
    found = [entry["tokens_per_second"] for entry in trainer.state.log_history if "tokens_per_second" in entry]
    assert found == pytest.approx(learned, rel=1e-3)


def test_twenty_steps_follow_the_pinned_curve(make_trainer):
    """After an intended change: POINTILLIST_PIN=1 python -m pytest tests/training -k pinned_curve"""
    trainer = make_trainer(max_steps=20, learning_rate=3e-3, save_strategy="no")
    trainer.train()
    assert_pinned("point_model", losses_of(trainer))


# ---- checkpoints


def whole(folder):
    folder.mkdir(parents=True)
    (folder / COMPLETE).write_bytes(b"")
    return folder


@pytest.mark.parametrize("asked", [None, "false", "False", "no", "0"])
def test_no_checkpoint_is_asked_for(asked, tmp_path):
    whole(tmp_path / "checkpoint-3")
    assert checkpoint_to_resume(asked, str(tmp_path)) is None


def test_the_newest_whole_checkpoint_is_taken_by_number(tmp_path):
    for step in (9, 10, 100):
        whole(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-200").mkdir()
    (tmp_path / "checkpoint-notes").mkdir()
    for asked in ("true", "True", "latest", "1"):
        assert Path(checkpoint_to_resume(asked, str(tmp_path))).name == "checkpoint-100"


def test_without_a_whole_checkpoint_a_run_begins(tmp_path):
    (tmp_path / "checkpoint-200").mkdir()
    assert checkpoint_to_resume("true", str(tmp_path)) is None
    assert checkpoint_to_resume("true", str(tmp_path / "nowhere")) is None


def test_a_checkpoint_by_name_must_be_there_and_whole(tmp_path):
    folder = whole(tmp_path / "checkpoint-3")
    assert checkpoint_to_resume(str(folder), "elsewhere") == str(folder)
    (folder / COMPLETE).unlink()
    with pytest.raises(ValueError, match="checkpoint-3: not a complete checkpoint"):
        checkpoint_to_resume(str(folder), "elsewhere")
    with pytest.raises(FileNotFoundError, match="checkpoint-4: no such folder"):
        checkpoint_to_resume(str(tmp_path / "checkpoint-4"), "elsewhere")


def test_older_checkpoints_go_only_after_the_new_one_is_whole(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(max_steps=3, save_total_limit=1)
    marks = []
    original = exact_trainer.rotate_checkpoints

    def spy(folder, *arguments):
        marks.append(sorted(path.parent.name for path in Path(folder).glob(f"checkpoint-*/{COMPLETE}")))
        original(folder, *arguments)

    monkeypatch.setattr(exact_trainer, "rotate_checkpoints", spy)
    trainer.train()
    with_the_one_before = [["checkpoint-1"], ["checkpoint-1", "checkpoint-2"], ["checkpoint-2", "checkpoint-3"]]
    assert marks == [*with_the_one_before, ["checkpoint-3"]]  # and once more at the end
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    assert trainer.args.save_total_limit == 1


def full_disk_of_python(*arguments, **keywords):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_disk_of_safetensors(*arguments, **keywords):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def full_disk_of_torch(*arguments, **keywords):
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 640 vs 598")


@pytest.mark.parametrize("error", [full_disk_of_python, full_disk_of_safetensors, full_disk_of_torch])
@pytest.mark.parametrize("writer", ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state"])
def test_a_full_disk_is_said_once_and_leaves_earlier_checkpoints_whole(
    make_trainer, tmp_path, monkeypatch, error, writer
):
    trainer = make_trainer(max_steps=3, save_total_limit=1)
    original = getattr(PointillistTrainer, writer)

    def write(self, *arguments, **keywords):
        original(self, *arguments, **keywords)
        if self.state.global_step == 2:
            error()

    monkeypatch.setattr(PointillistTrainer, writer, write)
    with pytest.raises(ValueError, match=r"the disk is full: \S+checkpoint-2 could not be written and was removed"):
        trainer.train()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-1"]
    assert checkpoint_to_resume("true", str(tmp_path / "run")).endswith("checkpoint-1")
    state = json.loads((tmp_path / "run" / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["global_step"] == 1 and math.isfinite(state["log_history"][0]["loss"])


def test_torch_says_of_a_full_disk_what_is_recognized():
    if not Path("/dev/full").exists():
        pytest.skip("no device that is always full")
    with pytest.raises((OSError, RuntimeError)) as caught, open("/dev/full", "wb") as file:
        torch.save({"a": torch.zeros(100_000)}, file)
    assert disk_is_full(caught.value)


def test_other_errors_are_not_taken_for_a_full_disk(make_trainer, monkeypatch):
    assert not disk_is_full(OSError(errno.EACCES, "Permission denied"))
    assert not disk_is_full(RuntimeError("shape mismatch"))

    def broken(*arguments, **keywords):
        raise RuntimeError("something else")

    trainer = make_trainer()
    monkeypatch.setattr(PointillistTrainer, "_save_rng_state", broken)
    with pytest.raises(RuntimeError, match="something else"):
        trainer.train()


@pytest.mark.newest
def test_weights_come_back_from_a_checkpoint_all_of_them(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=2)
    trainer.train()
    trained = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    again = make_trainer(max_steps=2)
    with torch.no_grad():
        for parameter in again.model.parameters():
            parameter.fill_(7)
    again._load_from_checkpoint(str(tmp_path / "run" / "checkpoint-2"))
    assert all(torch.equal(value, trained[name]) for name, value in again.model.state_dict().items())


# ---- told to stop


def signalled_in_step(trainer: PointillistTrainer, step: int, number: int) -> PointillistTrainer:
    """The trainer, whose process gets a signal in the middle of a step."""
    original = trainer.training_step

    def training_step(*arguments, **keywords):
        if trainer.state.global_step == step - 1:
            os.kill(os.getpid(), number)
        return original(*arguments, **keywords)

    trainer.training_step = training_step
    return trainer


def losses_of(trainer: PointillistTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("save_steps", [1, 10])
def test_a_run_that_is_told_to_stop_saves_its_step_and_goes_on_to_the_same_weights(
    make_trainer, tmp_path, number, save_steps
):
    begun = signalled_in_step(make_trainer(save_steps=save_steps), 2, number)
    with pytest.raises(
        Interrupted, match=r"checkpoint-2 saved after 2 of 4 steps; .* --resume_from_checkpoint true"
    ) as e:
        begun.train()
    assert e.value.number == number
    checkpoint = checkpoint_to_resume("true", str(tmp_path / "run"))
    assert Path(checkpoint).name == "checkpoint-2"
    again = make_trainer(save_steps=save_steps)
    again.train(resume_from_checkpoint=checkpoint)
    whole = make_trainer(save_steps=save_steps, output_dir=str(tmp_path / "whole"))
    whole.train()
    assert losses_of(again) == losses_of(whole) and len(losses_of(whole)) == 4
    weights = [trainer.model.state_dict() for trainer in (again, whole)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_stop_between_two_entries_of_the_log_loses_no_loss(make_trainer, tmp_path):
    with pytest.raises(Interrupted):
        signalled_in_step(make_trainer(logging_steps=4, save_steps=10), 3, signal.SIGINT).train()
    again = make_trainer(logging_steps=4, save_steps=10)
    again.train(resume_from_checkpoint=checkpoint_to_resume("true", str(tmp_path / "run")))
    single = make_trainer(output_dir=str(tmp_path / "single"))
    single.train()
    losses = losses_of(single)
    assert losses_of(again) == pytest.approx([sum(losses[:3]) / 3, losses[3]])


def test_a_stop_saves_whatever_the_strategy_of_saving(make_trainer, tmp_path):
    with pytest.raises(Interrupted):
        best = {"save_strategy": "best", "metric_for_best_model": "nll", "eval_strategy": "steps", "eval_steps": 1}
        signalled_in_step(make_trainer(**best, greater_is_better=True), 3, signal.SIGTERM).train()
    assert Path(checkpoint_to_resume("true", str(tmp_path / "run"))).name == "checkpoint-3"


def test_a_resumed_run_says_if_nothing_is_left_to_train(make_trainer, tmp_path):
    make_trainer(max_steps=2).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    assert steps_ahead(None, 3, "4 windows") == "3 steps of 4 windows"
    assert steps_ahead(checkpoint, 3, "4 windows") == f"resuming from {checkpoint}"
    for steps in (2, 1):
        said = steps_ahead(checkpoint, steps, "4 windows")
        assert f"2 steps are done and --max_steps is {steps}, so nothing is left to train" in said
        assert "raise --max_steps" in said


# ---- what is left to transformers


def test_items_come_from_front_to_back_and_no_argument_can_change_that(make_trainer):
    trainer = make_trainer()
    assert list(trainer.get_train_dataloader().batch_sampler.sampler) == list(range(8))
    with pytest.raises(ValueError, match="no field --train_sampling_strategy"):
        parse_arguments(["--train_sampling_strategy", "random"], PretrainArguments, description="")


def test_the_best_checkpoint_is_loaded_at_the_end(make_trainer, tmp_path):
    best = {"metric_for_best_model": "nll", "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    # The worst of all held-out losses is that of the first step, here called the best.
    trainer = make_trainer(**best, greater_is_better=True, max_steps=3, learning_rate=0.01)
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-1"
    loaded = PointillistForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-1").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in trainer.model.state_dict().items())


def test_pushing_waits_for_the_finished_folder(make_trainer, monkeypatch):
    monkeypatch.setattr(PointillistTrainer, "init_hf_repo", lambda *_: None)
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: pytest.fail("uploaded a checkpoint"), raising=False)
    trainer = make_trainer(max_steps=2, push_to_hub=True)
    trainer.train()
    assert trainer.state.global_step == 2
