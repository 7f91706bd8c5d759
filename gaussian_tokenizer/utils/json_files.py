"""JSON objects; anything wrong with a file is one ValueError that names it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError that names the file if it is none, or nested too deep to be read."""
    return parse_json(path.read_bytes(), path)


def parse_json(content: str | bytes, where: object) -> dict[str, Any]:
    """As `read_json`, of what is already read from `where`."""
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{where}: holds a JSON {type(parsed).__name__}, expected an object")
    return parsed


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
