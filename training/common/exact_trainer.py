"""transformers' Trainer made exact: checkpoints that are whole or not there, and a stop that loses no step.

A checkpoint counts only once `COMPLETE` lies in it, written last by the main process after all others are done; resuming takes
the newest such folder, so a run killed in the middle of a save goes on from the save before. SIGTERM and Ctrl-C save one.

Private methods of transformers are used in this file alone, each with the reason; their signatures are the same from 5.17 to 5.24.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints, sort_checkpoints

from gaussian_tokenizer.utils.atomic import atomic_file, flush_to_disk
from gaussian_tokenizer.utils.disk import disk_is_full
from gaussian_tokenizer.utils.hub import one_line, upload
from training.common.process import Interrupted, StopSignals

COMPLETE = "COMPLETE"


class ExactTrainer(Trainer):
    """Trainer with `PretrainArguments`: it reads the training set from front to back, so item i says what step i sees, always."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.limit = self.args.save_total_limit
        self.unfinished: Path | None = None  # the checkpoint that is being written
        self.signals = StopSignals()
        self.checkpoints = Checkpoints(self)
        self.add_callback(self.checkpoints)

    def train(self, *args, **kwargs):
        """As Trainer's.

        Raises:
            Interrupted: SIGTERM or SIGINT came to one of the processes; all have finished and saved the same step.
            ValueError: the disk is full.
        """
        # Trainer removes old checkpoints before the new one is marked as whole; `finish_checkpoint` does it after.
        self.args.save_total_limit = None
        try:
            with self.signals, removed_if_disk_is_full(lambda: self.unfinished):
                output = super().train(*args, **kwargs)
        finally:
            self.args.save_total_limit = self.limit
        if self.checkpoints.stopped:
            self.accelerator.wait_for_everyone()  # the first to leave has its launcher end the others
            number = self.signals.received[0] if self.signals.received else signal.SIGTERM
            folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            said = f"{folder} saved after {self.state.global_step:,} of {self.args.max_steps:,} steps; run the same command with "
            said += "--resume_from_checkpoint true to go on from there"
            raise Interrupted(said if self.is_world_process_zero() else "", number)
        self.remove_old_checkpoints()  # which a run that was killed after its last step had no time for
        return output

    def save_model(self, output_dir=None, _internal_call=False):
        """As Trainer's, which begins every checkpoint with it: the folder is then emptied first."""
        folder = Path(output_dir or self.args.output_dir)
        if self.is_in_train and folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
            self.unfinished = folder
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)  # what a killed run may have left
            self.accelerator.wait_for_everyone()
        super().save_model(output_dir, _internal_call)

    def finish_checkpoint(self) -> None:
        """Once all processes have written: the arguments in words, the mark that it is whole, and only then older ones go."""
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
        """All but the newest `save_total_limit`, and the best."""
        if self.args.should_save:
            rotate_checkpoints(self.args.output_dir, self.limit, self.state.best_model_checkpoint)

    def init_hf_repo(self, token=None, private=None):
        """Trainer's: the repository is made before the training, so that one who may not is told now."""
        try:
            super().init_hf_repo(token, private)
        except Exception as error:  # the kinds are those of the HTTP library of the day
            raise ConnectionError(
                f"--push_to_hub true, but the repository cannot be made: {one_line(error)}; log in (hf auth login) while "
                "online, or train without it and upload the output folder later"
            ) from None

    # ---- private methods of transformers

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Weights by `from_pretrained`: checkpoints hold DINOv2 under its published names, which Trainer would pass over.

        Private, as Trainer offers nothing else: loading before or after it would leave its warning that these are missing.
        """
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        model = self.model if model is None else model
        loaded = type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype)
        model.load_state_dict(loaded.state_dict())

    def _load_best_model(self):
        """For the same reason."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def prepared(self, batch):
        """A batch on the device, and under DeepSpeed in the precision of the model, as training has it.

        By a private method, as only that knows DeepSpeed's precision; for the evaluations, which are our own.
        """
        return self._prepare_inputs(batch)

    # ---- the end

    def save_finished(self, write_more: Callable[[Path], None]) -> None:
        """The trained model into the output folder, and up to the Hub if asked.

        Written beside it first, `write_more(folder)` adding what else belongs to it (main process), then moved in file by file.
        """
        output = Path(self.args.output_dir)
        staging = output / ".model.partial"
        with removed_if_disk_is_full(lambda: staging):
            if self.is_world_process_zero():
                shutil.rmtree(staging, ignore_errors=True)  # what a killed run may have left
            self.accelerator.wait_for_everyone()
            self.save_model(str(staging), _internal_call=True)
            if not self.is_world_process_zero():
                return
            write_more(staging)
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
            # What else lies in the folder is not the model, and the arguments hold the token of the Hub.
            names = [path.name for path in written if path.name != "training_args.bin"]
            address = upload(output, self.hub_model_id, token=self.args.hub_token, only=names)
            print(f"uploaded: {address}", flush=True)


class Checkpoints(TrainerCallback):
    """Ends training after a step if a process was told to stop, with a checkpoint; marks every checkpoint as whole."""

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
        # All processes ask after the same step, and hear of a signal that any of them got.
        if accelerator.check_trigger():
            self.stopped = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        # Not at the end of the step: there, `save_strategy: best` decides on its own.
        if self.stopped and self.saved_at != state.global_step:
            control.should_save = control.should_log = True

    def on_save(self, args, state, control, **kwargs):
        self.saved_at = state.global_step
        self.trainer.finish_checkpoint()


@contextmanager
def removed_if_disk_is_full(written: Callable[[], Path | None]) -> Iterator[None]:
    """A full disk removes the folder that is being written, and becomes a `ValueError` that says how to go on."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        folder = written()
        if folder is None or not disk_is_full(error):
            raise
        shutil.rmtree(folder, ignore_errors=True)
        raise ValueError(
            f"the disk is full: {folder} could not be written and was removed ({error}). Earlier checkpoints are whole; "
            "free space, or lower --save_total_limit, and go on with --resume_from_checkpoint true"
        ) from error


def checkpoint_to_resume(asked: str | None, output_dir: str) -> str | None:
    """`--resume_from_checkpoint`: None or "false" -> None; "true" -> the newest whole one, if any; else that folder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder is not a whole checkpoint.
    """
    if asked is None or asked.lower() in ("false", "no", "0"):
        return None
    if asked.lower() in ("true", "yes", "1", "latest"):
        found = sort_checkpoints(output_dir) if os.path.isdir(output_dir) else []
        whole = [path for path in found if (Path(path) / COMPLETE).is_file()]
        return whole[-1] if whole else None
    if not os.path.isdir(asked):
        raise FileNotFoundError(f"--resume_from_checkpoint {asked}: no such folder; give one, or true for the newest")
    if not (Path(asked) / COMPLETE).is_file():
        raise ValueError(
            f"--resume_from_checkpoint {asked}: not a whole checkpoint (no file {COMPLETE}); give another, or true"
        )
    return asked


def going_on_from(checkpoint: str, max_steps: int) -> str:
    """What is said of a run that goes on: from where, and if there is nothing left to train."""
    done = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).global_step
    if done < max_steps:
        return f"going on from {checkpoint}"
    return (
        f"going on from {checkpoint}: with {done:,} steps done and --max_steps {max_steps:,} nothing is left to train, the model "
        "is evaluated and written as it is; raise --max_steps to train longer"
    )
