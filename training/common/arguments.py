"""Arguments of the training scripts: a YAML file for the run, any field of it again on the command line.

A script names dataclasses, and gets an instance of each. Nothing here loads transformers, which fitting does not need.
"""

import difflib
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import yaml
from huggingface_hub.errors import StrictDataclassError

from gaussian_tokenizer.utils.hub import one_line
from training.common.parser import dataclass_parser
from training.common.process import Interrupted

CONFIGS = Path(__file__).parents[1] / "configs"


def parse_arguments(argv: list[str], *classes: type, description: str) -> tuple:
    """`[run.yaml] [--field value ...]` -> one instance of each dataclass; the command line wins over the file.

    The help begins with the first paragraph of `description`. ValueError if the file is no mapping, or a name is not a field.
    """
    names = [field.name for cls in classes for field in fields(cls) if field.init]
    flags = ["--help", "--help_all", *(f"--{name}" for name in names)]
    settings = {}
    if argv and not argv[0].startswith("-"):
        path = find_config(argv[0])
        settings = read_yaml(path)
        for name in settings:
            if name not in names:
                raise ValueError(f"{path}: no field {name!r}{nearest(name, names)}")
    words = []
    for word in argv:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            flag = f"--{flag[2:].replace('-', '_')}"
            if not any(known.startswith(flag) for known in flags):
                raise ValueError(f"no field {flag}{nearest(flag, flags)}; --help lists all")
            word = flag + equals + value
        words.append(word)
    parser = dataclass_parser(classes, settings, description.split("\n\n")[0], "--help_all" in words)
    values = vars(parser.parse_args(words))
    return tuple(cls(**{field.name: values[field.name] for field in fields(cls) if field.init}) for cls in classes)


def find_config(name: str) -> Path:
    """The YAML file at the path `name`, or the toolkit's config of that name: `debug` is training/configs/debug.yaml.

    Raises `FileNotFoundError` that lists the names where there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}
    if name not in shipped:
        raise FileNotFoundError(f"{name}: no such config file; give a path, or a name of {', '.join(shipped)}")
    return shipped[name]


def nearest(name: str, known: Iterable[str]) -> str:
    """A suggestion for a misspelled name, or nothing."""
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def read_yaml(path: Path) -> dict:
    """A mapping from a YAML file."""
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML ({one_line(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected fields and values, found {type(content).__name__}")
    return content


@contextmanager
def flag_named(flag: str, value: str) -> Iterator[None]:
    """Turn transformers' error for a missing model into one line with the flag that asked for the model."""
    try:
        yield
    except OSError as error:
        raise FileNotFoundError(
            f"{flag} {value}: no such model here, neither as a folder with config.json and model.safetensors nor in the "
            f"cache of the Hub; correct it, or download it while online (HF_HUB_OFFLINE=0) ({one_line(error)})"
        ) from error


def exit_on_user_error(main: Callable[[], object]) -> None:
    """Run `main`; an error that the user can correct, or a signal, becomes one line instead of a traceback."""
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
        # The message of the configuration itself, without the validator's name around it.
        cause = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
        sys.exit(f"error: {cause}")
