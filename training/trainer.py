"""transformers' Trainer with what point clouds need: ordered windows, slot metrics, speed in the logs, checkpoints that are whole.

A checkpoint counts only once `COMPLETE` lies in it, written last by the main process after all others are done; resuming takes
the newest such folder, so a run killed in the middle of a save goes on from the save before.
"""

import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.utils.data import SequentialSampler
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints, sort_checkpoints

from gaussian_tokenizer.atomic import atomic_file
from training.metrics import decoder_parameters, flops_per_token, peak_flops, slot_metrics, slot_sums

COMPLETE = "COMPLETE"


class PointillistTrainer(Trainer):
    """Trains `PointillistForCausalLM` on `TrainWindows`, evaluates it on `EvaluationWindows`.

    Logs beside Trainer's own: tokens_per_second (all processes) and mfu since the last log; eval_nll, eval_perplexity and
    eval_accuracy, overall and for the slots x, y, z, b.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tokens_since_log, self.last_log = 0, time.perf_counter()
        model = self.accelerator.unwrap_model(self.model)
        self.num_decoder_parameters = decoder_parameters(model)
        self.context = min(self.train_dataset.window, float(self.train_dataset.rows.lengths.mean()))
        self.peak = peak_flops(self.args.device)

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.tokens_since_log += int((inputs["labels"] != -100).sum())
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            now = time.perf_counter()
            speed = self.tokens_since_log * self.args.world_size / (now - self.last_log)
            model = self.accelerator.unwrap_model(self.model)
            flops = flops_per_token(
                model.config, self.num_decoder_parameters, self.context, self.num_condition_tokens()
            )
            logs["tokens_per_second"] = round(speed, 1)
            logs["mfu"] = round(speed * flops / (self.peak * self.args.world_size), 4)
            self.tokens_since_log, self.last_log = 0, now
        super().log(logs, *args, **kwargs)

    def num_condition_tokens(self) -> int:
        """How many tokens the decoder's cross-attention reads."""
        config = self.accelerator.unwrap_model(self.model).config
        tokens = config.point_latents if config.use_point_encoder else 0
        if config.use_vision_encoder:
            tokens += (self.train_dataset.rows.tokenizer.image_size // config.vision_config.patch_size) ** 2 + 1
        return tokens

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Slot metrics over the whole held-out split, the same on every process."""
        begin = time.perf_counter()
        loader = self.get_eval_dataloader(eval_dataset)
        # DeepSpeed and FSDP evaluate their wrapped model; without training before, there is none yet.
        model = self.model_wrapped if self.model_wrapped is not None else self.model
        model.eval()
        sums = torch.zeros(3, 4, dtype=torch.double, device=self.args.device)
        for batch in loader:
            batch = self._prepare_inputs(batch)
            labels = batch.pop("labels")
            with self.compute_loss_context_manager():
                logits = model(**batch).logits
            sums += self.accelerator.gather_for_metrics(slot_sums(logits, labels)).sum(0)
        metrics = slot_metrics(sums, f"{metric_key_prefix}_")
        metrics[f"{metric_key_prefix}_loss"] = metrics[f"{metric_key_prefix}_nll"]
        metrics[f"{metric_key_prefix}_runtime"] = round(time.perf_counter() - begin, 3)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.last_log = time.perf_counter()
        return metrics

    def save_model(self, output_dir=None, _internal_call=False):
        """Weights and configuration, and the tokenizer beside them.

        (As a `processing_class` Trainer would take it for a processor of text and look for a tokenizer inside it.)
        """
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self.train_dataset.rows.tokenizer.save_pretrained(output_dir or self.args.output_dir)

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
