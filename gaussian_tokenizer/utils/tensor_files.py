"""Our own safetensors files: tensors, and one entry of JSON metadata that says what they are."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gaussian_tokenizer.utils.atomic import atomic_file
from gaussian_tokenizer.utils.json_files import parse_json


@dataclass(frozen=True)
class TensorFormat:
    """One kind of file; `what` ("a head model file") and `remedy` are words of its errors."""

    what: str
    entry: str  # the metadata key
    version: str  # the value of "format" in that entry
    remedy: str

    def write(self, path: str | Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Write a file, atomically."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        # One metadata entry: safetensors does not promise the order of several, and equal content gives equal files.
        content = save(tensors, metadata={self.entry: json.dumps({"format": self.version, **about})})
        with atomic_file(path) as file:
            file.write(content)

    @contextmanager
    def opened(self, path: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """The metadata and the tensors, mapped from the file; what the block finds wrong is a ValueError that names the file."""
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such {self.what.partition(' ')[2]}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                about = parse_json(metadata.get(self.entry, "{}"), f"metadata entry {self.entry}")
                if (found := about.get("format")) != self.version:
                    raise ValueError(f"its metadata says format {found!r}, expected {self.version!r}")
                yield about, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}: not {self.what} ({reason}); {self.remedy}") from None
