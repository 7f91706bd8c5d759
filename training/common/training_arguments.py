"""Arguments that the trainings of both networks share: transformers' own, with other defaults and a few checks."""

import os
import warnings
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from gaussian_tokenizer.utils.precision import choose_bf16
from training.common.parser import option


@dataclass
class PretrainArguments(TrainingArguments):
    """Training: transformers' TrainingArguments with the paper's defaults (AdamW, 1e-4, 50,000 steps, batch 4, bf16)."""

    output_dir: str = option("folder for the checkpoints and the trained model", "outputs/pretrain")
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 1000
    max_steps: int = option("length of the training in optimizer steps", 50_000)
    resume_from_checkpoint: str | None = option("a checkpoint, or true: the newest complete one, if any", None)
    bf16: bool | str = option("train in bfloat16; auto: where the device is fast in it", False)  # type: ignore[assignment]
    push_to_hub: bool = option("upload the finished folder to the Hub", False)
    per_device_train_batch_size: int = 4
    per_device_eval_batch_size: int = 4
    eval_strategy: str = "steps"
    eval_steps: float = 1000
    save_steps: float = 1000
    save_total_limit: int | None = 3
    logging_steps: float = 10
    report_to: str = "none"
    remove_unused_columns: bool = False
    ddp_find_unused_parameters: bool | None = False
    # Not options: items come in the order of the training set, and a repository gets the finished folder once, without
    # Trainer's arguments, which hold the token.
    train_sampling_strategy: str = field(default="sequential", init=False)
    hub_strategy: str = field(default="end", init=False)
    num_threads: int | None = option("CPU threads per process; by default the cores divided by the processes", None)

    def __post_init__(self):
        if self.max_steps < 1:
            raise ValueError(
                f"--max_steps must be the length of the training, at least 1, found {self.max_steps} (epochs are not counted)"
            )
        if self.use_cpu or not torch.cuda.is_available():
            self.dataloader_pin_memory = False
            if self.ddp_backend is None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
                self.ddp_backend = "gloo"
            # DeepSpeed finds the CPU by itself; without DeepSpeed, accelerate would train separately in every process.
            if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") != "true":
                self.use_cpu = True
            # `accelerate launch` gives every process one thread by default.
            processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            torch.set_num_threads(self.num_threads or max(1, (os.cpu_count() or 1) // processes))
        self.choose_precision()
        super().__post_init__()
        if (
            self.bf16_auto
        ):  # only now, as transformers' check admits no bf16 on CPUs under DeepSpeed, but Trainer compares
            self.bf16 = self.mixed_precision == "bf16"

    def choose_precision(self) -> None:
        """Replace `--bf16 auto` by true or false, and note why.

        DeepSpeed takes the precision from the launcher's configuration, and `auto` leaves it so, as under any launcher that asks
        for a precision.
        """
        self.bf16_auto = self.bf16 == "auto"
        deepspeed = bool(self.deepspeed) or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if self.bf16_auto and self.deepspeed:
            raise ValueError(
                "--bf16 auto: the file of --deepspeed sets the precision; give --bf16 true or false as it says"
            )
        if self.bf16 is True and deepspeed and not torch.cuda.is_available():
            raise ValueError(
                "--bf16 true: DeepSpeed on CPUs takes the precision of its launcher; give accelerate launch "
                "--mixed_precision bf16, or set it in its config file, and --bf16 auto"
            )
        if (self.bf16_auto and deepspeed) or (launched != "no" and self.bf16 is not True):
            self.bf16, self.precision_reason = False, "the configuration of the launcher"
        else:
            asked, device = None if self.bf16_auto else bool(self.bf16), "cpu" if self.use_cpu else "cuda"
            self.bf16, self.precision_reason = choose_bf16(asked, device, f"--bf16 {str(self.bf16).lower()}")
        # Of norms with float32 weights under autocast: torch has no fused kernel for them.
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")

    @property
    def items_per_step(self) -> int:
        """Items of the training set in a step of the optimizer, over all processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * max(1, self.world_size)
