"""Command-line options from a dataclass of settings, without the imports of transformers' HfArgumentParser."""

import argparse
from collections.abc import Collection, Mapping
from dataclasses import field, fields
from typing import Any


def option(default: Any, help: str, **keywords: Any) -> Any:
    """A dataclass field with its help text and, if it is not `type(default)`, its `type` on the command line."""
    keywords = {"action": "store_true"} if isinstance(default, bool) else {"type": type(default), **keywords}
    return field(default=default, metadata={"help": help, "default": default, **keywords})


def add_options(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup, kind: Any, skip: Collection[str] = ()
) -> None:
    """Add an option for every field of a dataclass of settings, but for those to skip."""
    for each in fields(kind):
        if each.name not in skip:
            parser.add_argument(f"--{each.name}", **each.metadata)


def from_options(kind: Any, options: Mapping[str, Any]) -> Any:
    """The dataclass with the values of the options; fields without an option keep their default."""
    return kind(**{each.name: options[each.name] for each in fields(kind) if each.name in options})
