"""What `--help` of the training scripts prints: the toolkit's fields in groups, with the most used ones of transformers.

`--help_all` adds the rest of transformers' `TrainingArguments`, a hundred fields. Each field is one entry: its name, what it
takes, what it means, and its value if it is left out, which is the YAML file's if one is given.
"""

import argparse
import shutil
import textwrap
from dataclasses import fields
from enum import Enum
from inspect import get_annotations

from transformers import HfArgumentParser, TrainingArguments

MOST_USED = (
    "seed", "gradient_accumulation_steps", "bf16", "activation_checkpointing", "torch_compile", "dataloader_num_workers",
    "use_cpu", "disable_tqdm", "hub_model_id", "hub_private_repo",
)  # fmt: skip
COLUMN = 32  # where explanations begin
TYPES = {"int": "INT", "float": "FLOAT", "str": "TEXT", "string_to_bool": "true|false"}


class GroupedParser(HfArgumentParser):
    """`HfArgumentParser` with this help; the classes' first lines are the titles of their groups."""

    def __init__(self, classes: tuple[type, ...], **kwargs):
        super().__init__(classes, **kwargs)
        self.every = False
        if any(issubclass(cls, TrainingArguments) for cls in classes):
            self.add_argument(
                "--help_all", nargs=0, action=HelpAll, help="the rest of transformers' TrainingArguments too"
            )

    def format_help(self) -> str:
        entries = {action.dest: action for action in reversed(self._actions)}  # of --x and --no_x, --x
        lines = [self.format_usage().strip(), "", *textwrap.wrap(str(self.description), _width())]
        for cls, title, names in self.groups():
            lines += ["", title, *(line for name in names for line in _entry(entries[name], explanation(cls, name)))]
        if "help_all" in entries and not self.every:
            lines += [
                "",
                "--help_all lists the other fields of transformers' TrainingArguments; they can be given like these.",
            ]
        return "\n".join(lines) + "\n"

    def groups(self) -> list[tuple[type, str, list[str]]]:
        """Class, title and names, in the order of the classes; transformers' own fields last and only if asked for."""
        found: list[tuple[type, str, list[str]]] = []
        rest: list[str] = []
        for cls in self.dataclass_types:
            names = [field.name for field in fields(cls) if field.init]
            if issubclass(cls, TrainingArguments):
                shown = own_fields(cls) | set(MOST_USED)
                rest += [name for name in names if name not in shown]
                names = sorted((name for name in names if name in shown), key=_place)
            found.append((cls, str(cls.__doc__).split("\n\n")[0], names))
        title = "The rest of transformers' TrainingArguments."
        return found + ([(TrainingArguments, title, rest)] if self.every and rest else [])


class HelpAll(argparse.Action):
    """`--help_all`."""

    def __call__(self, parser, *_):
        parser.every = True
        parser.print_help()
        parser.exit()


def own_fields(cls: type) -> set[str]:
    """Names of the fields that a class and its bases set before transformers' own."""
    bases = [base for base in cls.__mro__ if issubclass(base, TrainingArguments) and base is not TrainingArguments]
    return {name for base in bases for name in get_annotations(base)}


def explanation(cls: type, name: str) -> str:
    """The help of a field, or of the field of a base that it gives another value."""
    declared = [vars(base).get("__dataclass_fields__", {}).get(name) for base in cls.__mro__]
    texts = [field.metadata.get("help", "") for field in declared if field is not None]
    return next((text.replace("%%", "%") for text in texts if text), "")


def _place(name: str) -> int:
    """The most used ones of transformers come after ours, in their own order."""
    return MOST_USED.index(name) if name in MOST_USED else -1


def _entry(action: argparse.Action, text: str) -> list[str]:
    """`  --name TYPE    what it means (default: 3)`, wrapped."""
    takes = (
        "|".join(map(str, action.choices))
        if action.choices
        else TYPES.get(getattr(action.type, "__name__", ""), "VALUE")
    )
    head = f"  --{action.dest} {takes}{' ...' if action.nargs in ('+', '*') else ''}"
    default = action.default.value if isinstance(action.default, Enum) else action.default
    if action.required:
        text += " (required)"
    elif default not in (None, argparse.SUPPRESS):
        text += f" (default: {default})"
    lines = textwrap.wrap(" ".join(text.split()), max(20, _width() - COLUMN)) or [""]
    indented = [" " * COLUMN + line for line in lines]
    return [head.ljust(COLUMN) + lines[0], *indented[1:]] if len(head) < COLUMN else [head, *indented]


def _width() -> int:
    return min(120, shutil.get_terminal_size().columns)
