"""transformers' Trainer made exact: a checkpoint counts only if it is complete, and a run stopped by a signal loses no step.

Private methods of transformers are used in this file alone, each for a stated reason. Their signatures are the same from 5.17 to
5.24.
"""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints, sort_checkpoints

from gaussian_tokenizer.utils.atomic import atomic_file, flush_to_disk
from gaussian_tokenizer.utils.disk import disk_is_full
from gaussian_tokenizer.utils.hub import one_line, upload
from training.common.process import Interrupted, StopSignals
from training.common.training_arguments import PretrainArguments

COMPLETE = "COMPLETE"  # the main process writes it into a checkpoint last, after all others are done


class ExactTrainer(Trainer):
    """Trainer with `PretrainArguments` that reads the training set in order: step i sees the same items in every run."""

    args: PretrainArguments
    train_dataset: Any
    eval_dataset: Any

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.limit = self.args.save_total_limit
        self.unfinished: Path | None = None  # the checkpoint that is being written
        self.signals = StopSignals()
        self.checkpoints = Checkpoints(self)
        self.add_callback(self.checkpoints)

    def train(self, *args, **kwargs):
        """As Trainer's. `Interrupted` if a signal reached one of the processes: all have finished and saved the same step."""
        # Trainer removes old checkpoints before the new one is marked as complete; `finish_checkpoint` does it after.
        self.args.save_total_limit = None
        try:
            with self.signals, removed_if_disk_is_full(lambda: self.unfinished):
                output = super().train(*args, **kwargs)
        finally:
            self.args.save_total_limit = self.limit
        if self.checkpoints.stopped:
            self.accelerator.wait_for_everyone()  # a launcher ends the other processes once the first one exits
            number = self.signals.received[0] if self.signals.received else signal.SIGTERM
            step = self.state.global_step
            folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
            said = f"{folder} saved after {step:,} of {self.args.max_steps:,} steps; run the same command with "
            said += "--resume_from_checkpoint true to resume from there"
            raise Interrupted(said if self.is_world_process_zero() else "", number)
        self.remove_old_checkpoints()  # a run that was killed after its last step may have left some
        return output

    def train_and_evaluate(self, checkpoint: str | None, about: str, items: str) -> dict[str, float]:
        """Print what is trained on how many items, train; returns the metrics of the last step."""
        if self.is_world_process_zero():
            ahead = steps_ahead(checkpoint, self.args.max_steps, f"{self.args.items_per_step} {items}")
            print(about + ahead, flush=True)
        self.train(resume_from_checkpoint=checkpoint)
        evaluations = [entry for entry in self.state.log_history if "eval_loss" in entry]
        if evaluations and evaluations[-1]["step"] == self.state.global_step:
            return evaluations[-1]
        return self.evaluate()

    def batch_sums(self, model, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, ...) float64: what to add up over the items of the evaluation set, such as errors and counts."""
        raise NotImplementedError

    def mean_metrics(self, total: Tensor) -> dict[str, float]:
        """The metrics, `loss` among them, from the sum over all items."""
        raise NotImplementedError

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Metrics of the whole evaluation set, the same on every process."""
        begin = time.perf_counter()
        # DeepSpeed and FSDP evaluate their wrapped model, which does not exist before training.
        model = self.model_wrapped if self.model_wrapped is not None else self.model
        model.eval()
        total: Any = 0
        for batch in self.get_eval_dataloader(eval_dataset):
            # Private: only this method knows the precision that DeepSpeed gives the model in training.
            sums = self.batch_sums(model, self._prepare_inputs(batch))
            total = total + self.accelerator.gather_for_metrics(sums).sum(0)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.mean_metrics(total).items()}
        metrics[f"{metric_key_prefix}_runtime"] = round(time.perf_counter() - begin, 3)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def first_and_last_loss(self) -> dict[str, float | None]:
        """Of the training log, as reports have them."""
        losses: list = [entry["loss"] for entry in self.state.log_history if "loss" in entry] or [None]
        return {"train_loss_first": losses[0], "train_loss_last": losses[-1]}

    def save_model(self, output_dir=None, _internal_call=False):
        """As Trainer's, which begins every checkpoint with this call: the checkpoint's folder is emptied first."""
        folder = Path(output_dir or self.args.output_dir)
        if self.is_in_train and folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
            self.unfinished = folder
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)  # a killed run may have left it
            self.accelerator.wait_for_everyone()
        super().save_model(output_dir, _internal_call)

    def finish_checkpoint(self) -> None:
        """After all processes have written: save the arguments as JSON, mark the checkpoint as complete, remove older ones."""
        assert self.unfinished is not None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            arguments = {k: v for k, v in self.args.to_sanitized_dict().items() if "token" not in k}
            with atomic_file(self.unfinished / "training_arguments.json") as file:
                file.write(json.dumps(arguments | {"save_total_limit": self.limit}, indent=2, sort_keys=True).encode())
            with atomic_file(self.unfinished / COMPLETE) as file:
                file.write(b"")
        self.remove_old_checkpoints()
        self.unfinished = None

    def remove_old_checkpoints(self) -> None:
        """Keep the newest `save_total_limit`, and the best."""
        if self.args.should_save:
            rotate_checkpoints(self.args.output_dir, self.limit, self.state.best_model_checkpoint)

    def init_hf_repo(self, token=None, private=None):
        """Trainer's: it creates the repository before the training, so that a missing permission is reported early."""
        try:
            super().init_hf_repo(token, private)
        except Exception as error:  # the type depends on the HTTP library
            raise ConnectionError(
                f"--push_to_hub true, but the repository cannot be made: {one_line(error)}; log in (hf auth login) while "
                "online, or train without it and upload the output folder later"
            ) from None

    # ---- private methods of transformers

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Weights by `from_pretrained`: checkpoints hold DINOv2 under its published names, which Trainer would ignore.

        Private, as Trainer offers nothing else: loading before or after it would leave its warning that these are missing.
        """
        if self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        model = self.model if model is None else model
        loaded = type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype)
        model.load_state_dict(loaded.state_dict())

    def _load_best_model(self):
        """For the same reason."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return super()._load_best_model()
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    # ---- the end

    def save_finished(self, summarize: Callable[[], tuple[dict, str]]) -> None:
        """Write the trained model with its report, log and card, which `summarize` makes; upload them if asked to."""
        output = Path(self.args.output_dir)
        staging = output / ".model.partial"
        with removed_if_disk_is_full(lambda: staging):
            if self.is_world_process_zero():
                shutil.rmtree(staging, ignore_errors=True)  # a killed run may have left it
            self.accelerator.wait_for_everyone()
            self.save_model(str(staging), _internal_call=True)
            if not self.is_world_process_zero():
                return
            report, card = summarize()
            (staging / "README.md").write_text(card)
            (staging / "training_report.json").write_text(json.dumps(report, indent=2))
            (staging / "training_log.json").write_text(json.dumps(self.state.log_history, indent=1))
            # Old weights go first and new ones come last: a folder without weights does not load, so no mix is taken for a model.
            for stale in [*output.glob("model*.safetensors"), *output.glob("model.safetensors.index.json")]:
                stale.unlink()
            written = sorted(staging.iterdir(), key=lambda path: (path.suffix == ".safetensors", path.name))
            for path in written:
                with open(path, "rb") as file:
                    flush_to_disk(file)
                path.replace(output / path.name)
            shutil.rmtree(staging)
        if self.args.push_to_hub:
            # The folder's other files do not belong to the model, and the arguments hold the token of the Hub.
            names = [path.name for path in written if path.name != "training_args.bin"]
            address = upload(output, self.hub_model_id, token=self.args.hub_token, only=names)
            print(f"uploaded: {address}", flush=True)


class Checkpoints(TrainerCallback):
    """Saves and ends the training after the step in which a process got a signal; marks every checkpoint as complete."""

    def __init__(self, trainer: ExactTrainer):
        self.trainer = trainer
        self.stopped = False
        self.saved_at: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.stopped, self.saved_at = False, None

    def on_step_end(self, args, state, control, **kwargs):
        accelerator = self.trainer.accelerator
        if self.trainer.signals.received:
            accelerator.set_trigger()
        # All processes check after the same step, and see a signal that any one of them got.
        if accelerator.check_trigger():
            self.stopped = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        # Not at the end of the step, where `save_strategy: best` makes its own decision.
        if self.stopped and self.saved_at != state.global_step:
            control.should_save = control.should_log = True

    def on_save(self, args, state, control, **kwargs):
        self.saved_at = state.global_step
        self.trainer.finish_checkpoint()


@contextmanager
def removed_if_disk_is_full(written: Callable[[], Path | None]) -> Iterator[None]:
    """A full disk removes the folder that is being written, and becomes a `ValueError` that says how to resume."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        folder = written()
        if folder is None or not disk_is_full(error):
            raise
        shutil.rmtree(folder, ignore_errors=True)
        raise ValueError(
            f"the disk is full: {folder} could not be written and was removed ({error}). Earlier checkpoints are complete; "
            "free space, or lower --save_total_limit, and resume with --resume_from_checkpoint true"
        ) from error


def checkpoint_to_resume(asked: str | None, output_dir: str) -> str | None:
    """`--resume_from_checkpoint`: None or "false" -> None; "true" -> the newest complete one, if any; else that folder.

    FileNotFoundError if there is no such folder, ValueError if it is not a complete checkpoint.
    """
    if asked is None or asked.lower() in ("false", "no", "0"):
        return None
    if asked.lower() in ("true", "yes", "1", "latest"):
        found = sort_checkpoints(output_dir) if os.path.isdir(output_dir) else []
        complete = [path for path in found if (Path(path) / COMPLETE).is_file()]
        return complete[-1] if complete else None
    if not os.path.isdir(asked):
        raise FileNotFoundError(f"--resume_from_checkpoint {asked}: no such folder; give one, or true for the newest")
    if not (Path(asked) / COMPLETE).is_file():
        raise ValueError(
            f"--resume_from_checkpoint {asked}: not a complete checkpoint (no file {COMPLETE}); give another, or true"
        )
    return asked


def steps_ahead(checkpoint: str | None, max_steps: int, batch: str) -> str:
    """What to print before a training: its steps, or the checkpoint that it resumes from and whether any steps are left."""
    if checkpoint is None:
        return f"{max_steps} steps of {batch}"
    done = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).global_step
    if done < max_steps:
        return f"resuming from {checkpoint}"
    return (
        f"resuming from {checkpoint}: {done:,} steps are done and --max_steps is {max_steps:,}, so nothing is left to train and "
        "the model is only evaluated and saved; raise --max_steps to train longer"
    )
