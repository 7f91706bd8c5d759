"""An argparse parser for dataclasses that reads them as transformers' `HfArgumentParser` does, without loading transformers."""

import argparse
import shutil
from collections.abc import Mapping
from dataclasses import MISSING, Field, field, fields
from enum import Enum
from inspect import get_annotations
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

MOST_USED = (
    "seed", "gradient_accumulation_steps", "bf16", "activation_checkpointing", "torch_compile", "dataloader_num_workers",
    "use_cpu", "disable_tqdm", "hub_model_id", "hub_private_repo",
)  # fmt: skip
TYPES = {"int": "INT", "float": "FLOAT", "str": "TEXT", "true_or_false": "true|false"}


def option(text: str, default: Any = MISSING) -> Any:
    """A dataclass field with its help text; required without a default."""
    return field(default=default, metadata={"help": text})


def dataclass_parser(
    classes: tuple[type, ...], settings: Mapping[str, Any], description: str, show_all: bool = False
) -> argparse.ArgumentParser:
    """A parser with an option `--name` for every field; `--help` has a group for each class.

    Fields that a class inherits from another package, such as the hundred of `TrainingArguments`, are shown by `--help_all`,
    and by `--help` if they are among the most used.
    Titles of groups are the first lines of docstrings; `settings` replace the defaults.
    """
    usage = "%(prog)s [config.yaml] [--field value ...]"
    parser = argparse.ArgumentParser(description=description, usage=usage, formatter_class=_Help)
    parser.add_argument("config", nargs="?", help=argparse.SUPPRESS)
    for cls in classes:
        hints, inherited = get_type_hints(cls), inherited_fields(cls)
        group = parser.add_argument_group(str(cls.__doc__).split("\n\n")[0])
        rest = parser.add_argument_group("The rest of transformers' TrainingArguments.")
        if inherited:
            parser.add_argument("--help_all", action="help", help=argparse.SUPPRESS)
            lists = "--help_all lists the other fields of transformers' TrainingArguments, which work like these."
            parser.epilog = None if show_all else lists
        for f in sorted((f for f in fields(cls) if f.init), key=lambda f: f.name in inherited):
            seldom = f.name in inherited and f.name not in MOST_USED
            default, note = _default(f, settings)
            text = argparse.SUPPRESS if seldom and not show_all else explanation(cls, f.name) + note
            (rest if seldom else group).add_argument(f"--{f.name}", help=text, **default, **_takes(hints[f.name]))
    return parser


def inherited_fields(cls: type) -> list[str]:
    """Names of the fields that only classes of other packages declare."""
    package = cls.__module__.partition(".")[0]
    bases = [base for base in cls.__mro__ if base.__module__.partition(".")[0] == package]
    declared = {name for base in bases for name in get_annotations(base)}
    return [f.name for f in fields(cls) if f.init and f.name not in declared]


def explanation(cls: type, name: str) -> str:
    """The help of a field, or that of a base class for a field that only gets another default."""
    declared = (vars(base).get("__dataclass_fields__", {}).get(name) for base in cls.__mro__)
    return next((f.metadata["help"] for f in declared if f is not None and "help" in f.metadata), "")


def true_or_false(word: str) -> bool:
    """A word of the command line or of YAML."""
    if word.lower() in ("true", "yes", "t", "y", "1"):
        return True
    if word.lower() in ("false", "no", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, found {word!r}")


def _takes(hint: Any) -> dict[str, Any]:
    """The arguments of `add_argument` for a type. Of a union, an enum decides, else bool, else str, else the first member."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else [hint]
    kinds = [kind for kind in members if kind is not NoneType]
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, Enum):
            return {"type": str, "choices": [member.value for member in kind]}
    more: dict[str, Any] = {}
    kind = next((kind for kind in (bool, str) if kind in kinds), kinds[0])
    if kind is bool:
        kind, more = true_or_false, {"nargs": "?", "const": True}
    elif get_origin(kind) is list:
        kind, more = get_args(kind)[0], {"nargs": "+"}
    return {"type": kind, "metavar": TYPES.get(getattr(kind, "__name__", ""), "VALUE"), **more}


def _default(field: Field, settings: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The arguments of `add_argument` for a default, and what the help says of it."""
    value = settings.get(field.name, field.default)
    if field.name in settings and isinstance(value, bool | int | float):
        value = str(value)  # argparse converts and checks defaults that are text
    elif field.name not in settings and field.default_factory is not MISSING:
        value = field.default_factory()
    if value is MISSING:
        return {"required": True}, " (required)"
    shown = value.value if isinstance(value, Enum) else value
    return {"default": value}, "" if value is None else f" (default: {shown})".replace("%", "%%")


class _Help(argparse.HelpFormatter):
    """With wider columns, and sentences as titles of groups."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=min(120, shutil.get_terminal_size().columns))

    def format_help(self) -> str:
        return super().format_help().replace(".:\n", ".\n")
