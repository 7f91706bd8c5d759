"""An argparse parser for dataclasses, with a `--help` in groups: one for each class, its fields in order.

As transformers' `HfArgumentParser` reads them, without loading transformers (seconds, for scripts that need none of it). Fields
that a class inherits from another package, such as the hundred of `TrainingArguments`, are shown by `--help_all`, and
by `--help` if they are among the most used. An entry is a field's name, type, meaning and default, which is the config file's
where that has one.
"""

import argparse
import shutil
import textwrap
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
COLUMN = 32  # where explanations begin
TYPES = {"int": "INT", "float": "FLOAT", "str": "TEXT", "true_or_false": "true|false"}


def option(text: str, default: Any = MISSING) -> Any:
    """A dataclass field with its help text; required without a default."""
    return field(default=default, metadata={"help": text})


class DataclassParser(argparse.ArgumentParser):
    """Options `--name` for the fields of dataclasses.

    Args:
        classes: the first lines of their docstrings are the titles of the groups.
        settings: values of fields that replace the defaults.
        show_all: whether the help shows inherited fields too.
    """

    def __init__(
        self, classes: tuple[type, ...], settings: Mapping[str, Any], description: str, show_all: bool = False
    ):
        super().__init__(description=description, usage="%(prog)s [config.yaml] [--field value ...]")
        self.classes, self.show_all = classes, show_all
        self.add_argument("config", nargs="?")
        self.entries: dict[str, list[str]] = {}  # lines of the help
        self.flags = ["--help"]
        for cls in classes:
            hints = get_type_hints(cls)
            for f in fields(cls):
                if f.init:
                    action = self.add_argument(*_flags(f), **_takes(hints[f.name]), **_default(f, settings))
                    self.entries[f.name] = _entry(action, explanation(cls, f.name))
                    self.flags += action.option_strings
        if any(inherited_fields(cls) for cls in classes):
            self.add_argument("--help_all", action="help")
            self.flags.append("--help_all")

    def instances(self, argv: list[str]) -> tuple:
        """One instance of each class."""
        values = vars(self.parse_args(argv))
        return tuple(cls(**{f.name: values[f.name] for f in fields(cls) if f.init}) for cls in self.classes)

    def format_help(self) -> str:
        lines = [self.format_usage().strip(), "", *textwrap.wrap(str(self.description), _width())]
        rest: list[str] = []
        for cls in self.classes:
            inherited = inherited_fields(cls)
            rest += [name for name in inherited if name not in MOST_USED]
            own = [f.name for f in fields(cls) if f.init and f.name not in inherited]
            lines += ["", str(cls.__doc__).split("\n\n")[0]]
            for name in own + [name for name in MOST_USED if name in inherited]:
                lines += self.entries[name]
        title = "The rest of transformers' TrainingArguments."
        if rest and self.show_all:
            lines += ["", title, *(line for name in rest for line in self.entries[name])]
        elif rest:
            lines += [
                "",
                "--help_all lists the other fields of transformers' TrainingArguments; they can be given like these.",
            ]
        return "\n".join(lines) + "\n"


def inherited_fields(cls: type) -> list[str]:
    """Names of the fields that only classes of other packages declare."""
    package = cls.__module__.partition(".")[0]
    bases = [base for base in cls.__mro__ if base.__module__.partition(".")[0] == package]
    declared = {name for base in bases for name in get_annotations(base)}
    return [f.name for f in fields(cls) if f.init and f.name not in declared]


def explanation(cls: type, name: str) -> str:
    """The help of a field, or that of a base class for a field that only gets another default."""
    declared = [vars(base).get("__dataclass_fields__", {}).get(name) for base in cls.__mro__]
    texts = [f.metadata.get("help", "") for f in declared if f is not None]
    return next((text.replace("%%", "%") for text in texts if text), "")


def true_or_false(word: str) -> bool:
    """A word of the command line or of YAML."""
    if word.lower() in ("true", "yes", "t", "y", "1"):
        return True
    if word.lower() in ("false", "no", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, found {word!r}")


def _flags(field: Field) -> dict[str, None]:
    return dict.fromkeys((f"--{field.name}", f"--{field.name.replace('_', '-')}"))


def _takes(hint: Any) -> dict[str, Any]:
    """The arguments of `add_argument` for a type. Of a union, an enum decides, else bool, else str, else the first member."""
    kinds = (
        [kind for kind in get_args(hint) if kind is not NoneType] if get_origin(hint) in (Union, UnionType) else [hint]
    )
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, Enum):
            return {"type": str, "choices": [member.value for member in kind]}
    if bool in kinds:
        return {"type": true_or_false, "nargs": "?", "const": True}
    if str in kinds:
        return {"type": str}
    if get_origin(kinds[0]) is list:
        return {"type": get_args(kinds[0])[0], "nargs": "+"}
    return {"type": kinds[0]}


def _default(field: Field, settings: Mapping[str, Any]) -> dict[str, Any]:
    if field.name in settings:
        value = settings[field.name]
        # argparse converts and checks defaults that are text.
        return {"default": str(value) if isinstance(value, bool | int | float) else value}
    if field.default_factory is not MISSING:
        return {"default": field.default_factory()}
    return {"required": True} if field.default is MISSING else {"default": field.default}


def _entry(action: argparse.Action, text: str) -> list[str]:
    """`  --name TYPE    what it means (default: 3)`, wrapped."""
    kind = TYPES.get(getattr(action.type, "__name__", ""), "VALUE")
    takes = "|".join(map(str, action.choices)) if action.choices else kind
    head = f"  --{action.dest} {takes}{' ...' if action.nargs == '+' else ''}"
    default = action.default.value if isinstance(action.default, Enum) else action.default
    if action.required:
        text += " (required)"
    elif default is not None:
        text += f" (default: {default})"
    lines = textwrap.wrap(" ".join(text.split()), max(20, _width() - COLUMN)) or [""]
    indented = [" " * COLUMN + line for line in lines]
    return [head.ljust(COLUMN) + lines[0], *indented[1:]] if len(head) < COLUMN else [head, *indented]


def _width() -> int:
    return min(120, shutil.get_terminal_size().columns)
