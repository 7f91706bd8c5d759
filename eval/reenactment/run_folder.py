"""Output folders that belong to one run: a run resumes only with the same model, dataset and settings."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gaussian_tokenizer.utils.atomic import atomic_file
from gaussian_tokenizer.utils.json_files import read_json

RUN_NAME = "run.json"


def claim(output: Path, own: dict[str, Any]) -> None:
    """Make the output folder this run's; ValueError with the differences if it is another run's."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / RUN_NAME
    if not path.is_file():
        if any(not each.name.startswith(".") for each in output.iterdir()):
            raise ValueError(f"{output}: neither empty nor an output folder of this bench; choose another --output_dir")
        write(path, json.dumps(own, indent=2) + "\n")
        return
    found = read_json(path)
    changed = [key for key in own if found.get(key, "missing") != own[key]]
    if changed:
        differing = [f"{key} was {found.get(key)!r}, is {own[key]!r}" for key in changed]
        raise ValueError(f"{output}: holds another run ({'; '.join(differing)}); choose another --output_dir")


def weights_digest(networks: Sequence[torch.nn.Module], settings: Sequence[dict[str, Any]], *others: str) -> str:
    """16 hex digits of a hash of weights and settings; the path they were loaded from does not matter."""
    found = hashlib.sha256()
    for network in networks:
        for name, value in network.state_dict().items():
            found.update(name.encode())
            found.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    ignored = {"_name_or_path", "transformers_version"}
    plain = [{key: value for key, value in each.items() if key not in ignored} for each in settings]
    found.update(json.dumps([*plain, *others], sort_keys=True, default=str).encode())
    return found.hexdigest()[:16]


def write(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())
