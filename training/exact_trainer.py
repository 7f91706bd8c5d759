"""transformers' Trainer made exact: items in a fixed order, and checkpoints that are whole or not there.

A checkpoint counts only once `COMPLETE` lies in it, written last by the main process after all others are done; resuming takes
the newest such folder, so a run killed in the middle of a save goes on from the save before.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch.utils.data import SequentialSampler
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints, sort_checkpoints

from gaussian_tokenizer.atomic import atomic_file, flush_to_disk
from gaussian_tokenizer.hub import one_line, upload

COMPLETE = "COMPLETE"


class ExactTrainer(Trainer):
    """Reads its training set from front to back: item i of the set says what step i sees, whatever was killed before."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Weights by `from_pretrained`: checkpoints hold DINOv2 under its published names, which Trainer would pass over."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        model = self.model if model is None else model
        loaded = type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype)
        model.load_state_dict(loaded.state_dict())

    def _load_best_model(self):
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def init_hf_repo(self, token=None, private=None):
        """Trainer's: the repository is made before the training, so that one who may not is told now."""
        try:
            super().init_hf_repo(token, private)
        except Exception as error:  # the kinds are those of the HTTP library of the day
            raise ConnectionError(
                f"--push_to_hub true, but the repository cannot be made: {one_line(error)}; log in (hf auth login) while "
                "online, or train without it and upload the output folder later"
            ) from None

    def _push_from_checkpoint(self, checkpoint_folder):
        """Nothing: the finished folder is uploaded once, without Trainer's arguments, which hold the token of the Hub."""

    def _save_checkpoint(self, model, trial):
        """Trainer's checkpoint, then the mark that it is whole, and only then older ones are removed."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with removed_if_disk_is_full(folder):
                if self.args.should_save:
                    shutil.rmtree(folder, ignore_errors=True)  # what a killed run may have left
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    arguments = {k: v for k, v in self.args.to_sanitized_dict().items() if "token" not in k}
                    with atomic_file(folder / "training_arguments.json") as file:
                        file.write(json.dumps(arguments, indent=2, sort_keys=True).encode())
                    with atomic_file(folder / COMPLETE) as file:
                        file.write(b"")
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(self.args.output_dir, limit, self.state.best_model_checkpoint)

    def save_finished(self, write_more: Callable[[Path], None]) -> None:
        """The trained model into the output folder, and up to the Hub if asked.

        Written beside it first, `write_more(folder)` adding what else belongs to it (main process), then moved in file by file.
        """
        output = Path(self.args.output_dir)
        staging = output / ".model.partial"
        with removed_if_disk_is_full(staging):
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


@contextmanager
def removed_if_disk_is_full(folder: Path) -> Iterator[None]:
    """While `folder` is written: a full disk removes it and becomes a `ValueError` that says how to go on."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not disk_is_full(error):
            raise
        shutil.rmtree(folder, ignore_errors=True)
        raise ValueError(
            f"the disk is full: {folder} could not be written and was removed ({error}). Earlier checkpoints are whole; "
            "free space, or lower --save_total_limit, and go on with --resume_from_checkpoint true"
        ) from error


def disk_is_full(error: BaseException) -> bool:
    """Whether an error of any of the writers (Python, safetensors, torch.save) means: no space left."""
    return (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)) or any(
        text in str(error)
        # torch.save says where its zip writer stopped, not why.
        for text in (
            "No space left",
            "StorageFull",
            "Disk quota exceeded",
            "os error 28",
            "inline_container",
            "iostream",
        )
    )


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
