"""Arguments of the training scripts: a YAML file for the run, any field of it again on the command line."""

import difflib
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import TrainingArguments

from training.common.configs import find_config
from training.common.help_text import GroupedParser
from training.common.process import Interrupted


@dataclass
class PretrainArguments(TrainingArguments):
    """Training: transformers' TrainingArguments with the paper's defaults (AdamW, 1e-4, 50,000 steps, batch 4, bf16)."""

    output_dir: str = field(
        default="outputs/pretrain", metadata={"help": "where checkpoints and the model are written"}
    )
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 1000
    max_steps: int = field(default=50_000, metadata={"help": "how long to train, in steps of the optimizer"})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "true: go on from the newest whole checkpoint of --output_dir, if there is one; or a folder"},
    )
    push_to_hub: bool = field(default=False, metadata={"help": "upload the finished folder to the Hub"})
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
    # No options: items come in the order of the training set, and a repository gets the finished folder once, without
    # Trainer's arguments, which hold the token.
    train_sampling_strategy: str = field(default="sequential", init=False)
    hub_strategy: str = field(default="end", init=False)
    num_threads: int | None = field(
        default=None, metadata={"help": "CPU threads of a process; left out, all cores shared among the processes"}
    )

    def __post_init__(self):
        on_cpu = self.use_cpu or not torch.cuda.is_available()
        if on_cpu:
            self.dataloader_pin_memory = False
            if self.ddp_backend is None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
                self.ddp_backend = "gloo"
            # DeepSpeed finds the CPU itself; for the rest accelerate must be told, else every process trains on its own.
            if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") != "true":
                self.use_cpu = True
            # `accelerate launch` gives every process one thread unless told otherwise.
            processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            torch.set_num_threads(self.num_threads or max(1, (os.cpu_count() or 1) // processes))
        super().__post_init__()


def parse_arguments(argv: list[str], *classes: type, description: str) -> tuple:
    """`[run.yaml] [--field value ...]` -> one instance of each dataclass; the command line wins over the file."""
    parser = GroupedParser(classes, description=description, usage="%(prog)s [config.yaml] [--field value ...]")
    parser.add_argument(
        "config", nargs="?", help="YAML file of fields; every one can be given again on the command line"
    )
    if argv and not argv[0].startswith("-"):
        path = find_config(argv[0])
        known = {action.dest for action in parser._actions} - {"help", "help_all", "config"}
        settings = read_yaml(path)
        for name in settings:
            if name not in known:
                raise ValueError(f"{path}: no field {name!r}{nearest(name, known)}")
        for action in parser._actions:
            if action.dest in settings:
                action.required = False
                value = settings[action.dest]
                action.default = (
                    str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
                )
                parser._defaults.pop(action.dest, None)
    for argument in argv:
        flag = argument.partition("=")[0]
        if flag.startswith("--") and not any(known.startswith(flag) for known in parser._option_string_actions):
            raise ValueError(f"no field {flag}{nearest(flag, parser._option_string_actions)}; --help lists all")
    *parsed, _config = parser.parse_args_into_dataclasses(argv)
    return tuple(parsed)


def nearest(name: str, known: Iterable[str]) -> str:
    """A suggestion for a misspelt name, or nothing."""
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def read_yaml(path: Path) -> dict:
    """A mapping from a YAML file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such config file; those of the toolkit lie in training/configs/")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected fields and values, found {type(content).__name__}")
    return content


@contextmanager
def flag_named(flag: str, value: str) -> Iterator[None]:
    """What transformers raises for a model that is not there becomes one line with the flag that asked for it."""
    try:
        yield
    except OSError as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{flag} {value}: no such model here, neither as a folder with config.json and model.safetensors nor in the "
            f"cache of the Hub; correct it, or download it while online (HF_HUB_OFFLINE=0) ({reason})"
        ) from error


def exit_on_user_error(main) -> None:
    """Run `main`; what a user can mend, or did with a signal, is said in one line instead of a traceback."""
    try:
        main()
    except Interrupted as stop:
        if str(stop):
            print(f"\n{stop}", file=sys.stderr, flush=True)
        sys.exit(128 + stop.number)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
    except (ValueError, FileNotFoundError, ConnectionError, StrictDataclassError) as error:
        if os.environ.get("POINTILLIST_TRACEBACK"):
            raise
        # The configuration's own words, without the name of the validator around them.
        cause = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
        sys.exit(f"error: {cause}")
