"""Arguments of the pre-training script: a YAML file for the run, any field of it again on the command line.

Three dataclasses, read by `help_text.GroupedParser`: the model, the data, and transformers' `TrainingArguments` with defaults of
the paper. A field that no class knows is refused with the nearest name there is.
"""

import difflib
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import Dinov2Config, TrainingArguments

from gaussian_tokenizer.processing_gaussian_tokenizer import GaussianTokenizer
from modeling import PointillistConfig
from training.help_text import GroupedParser
from training.process import Interrupted


@dataclass
class ModelArguments:
    """The model; defaults are the paper's."""

    model: str | None = field(
        default=None, metadata={"help": "checkpoint folder or Hub id to go on from; its sizes hold"}
    )
    hidden_size: int = field(default=1024, metadata={"help": "width of the decoder"})
    intermediate_size: int = field(default=4096, metadata={"help": "width of the feed-forward"})
    num_hidden_layers: int = field(default=24, metadata={"help": "blocks of the decoder"})
    num_attention_heads: int = field(default=16, metadata={"help": "heads of each attention"})
    num_key_value_heads: int | None = field(
        default=None, metadata={"help": "key/value heads; left out, as many as heads"}
    )
    head_dim: int = field(default=64, metadata={"help": "channels of a head"})
    partial_rotary_factor: float = field(default=0.5, metadata={"help": "share of a head that RoPE rotates"})
    rope_theta: float = field(default=10000.0, metadata={"help": "base wavelength of RoPE"})
    initializer_range: float = field(
        default=0.02, metadata={"help": "standard deviation of new weights; more if narrow"}
    )
    sliding_window: int = field(
        default=12000, metadata={"help": "tokens a token attends to, and tokens in a training window"}
    )
    loss_within_slot: bool = field(
        default=False,
        metadata={"help": "tell faces from faces and coordinates from coordinates only: cheaper, learns faster"},
    )
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "eager, sdpa, flash_attention_2, flex_attention"}
    )
    use_vision_encoder: bool = field(default=True, metadata={"help": "read a portrait"})
    vision_model: str | None = field(
        default=None, metadata={"help": "pre-trained DINOv2: folder or id such as facebook/dinov2-large"}
    )
    freeze_vision_encoder: bool | None = field(
        default=None, metadata={"help": "keep the portrait encoder as it is; left out, yes if --vision_model is given"}
    )
    vision_hidden_size: int = field(
        default=1024, metadata={"help": "width of the portrait encoder, without --vision_model"}
    )
    vision_num_layers: int = field(
        default=24, metadata={"help": "blocks of the portrait encoder, without --vision_model"}
    )
    vision_num_heads: int = field(
        default=16, metadata={"help": "heads of the portrait encoder, without --vision_model"}
    )
    vision_patch_size: int = field(default=14, metadata={"help": "pixels of a patch, without --vision_model"})
    use_point_encoder: bool = field(default=True, metadata={"help": "read the head mesh"})
    point_latents: int = field(default=256, metadata={"help": "tokens that describe the head mesh"})
    point_samples: int | None = field(
        default=None, metadata={"help": "vertices read of a finer mesh, evenly spaced; left out, all"}
    )
    point_frequencies: int = field(
        default=8, metadata={"help": "octaves of a vertex' Fourier embedding; fewer for few heads"}
    )
    point_hidden_size: int = field(default=768, metadata={"help": "width of the mesh encoder"})
    point_layers: int = field(default=8, metadata={"help": "blocks of the mesh encoder"})
    point_attention_heads: int = field(default=12, metadata={"help": "heads of the mesh encoder"})

    def config(self, tokenizer: GaussianTokenizer) -> PointillistConfig:
        """The configuration of a new model for this tokenizer's vocabulary."""
        vision = None
        if self.use_vision_encoder:
            if self.vision_model:
                with flag_named("--vision_model", self.vision_model):
                    vision = Dinov2Config.from_pretrained(self.vision_model)
            else:
                vision = Dinov2Config(
                    hidden_size=self.vision_hidden_size,
                    num_hidden_layers=self.vision_num_layers,
                    num_attention_heads=self.vision_num_heads,
                    patch_size=self.vision_patch_size,
                    image_size=tokenizer.image_size,
                )
        frozen = bool(self.vision_model) if self.freeze_vision_encoder is None else self.freeze_vision_encoder
        own = {f.name for f in fields(self)} & {f.name for f in fields(PointillistConfig)}
        lower, upper = tokenizer.bounds
        return PointillistConfig(
            n_bins=tokenizer.n_bins,
            n_faces=tokenizer.n_faces,
            vision_config=vision,
            point_centre=[(a + b) / 2 for a, b in zip(lower, upper)],
            point_extent=max(b - a for a, b in zip(lower, upper)) / 2,
            **({name: getattr(self, name) for name in own} | {"freeze_vision_encoder": frozen}),
        )


@dataclass
class DataArguments:
    """The corpus."""

    corpus: str = field(metadata={"help": "folder made by `python -m gaussian_tokenizer.build_corpus`"})
    condition_dropout: float = field(
        default=0.1, metadata={"help": "share of windows learned without condition, for guidance"}
    )
    eval_split: str = field(default="validation", metadata={"help": "held-out split"})
    max_eval_avatars: int | None = field(default=None, metadata={"help": "look at so many held-out avatars at most"})


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
    max_steps: int = field(default=50_000, metadata={"help": "how long to train, in steps of the optimiser"})
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
        path = Path(argv[0])
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
