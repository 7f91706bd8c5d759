"""What tests of trackings share: one synthetic person in the files of a VHAP export, and copies of it to break."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.procedural_head import build_procedural_head
from gaussian_tokenizer.synthesize import synthesize
from gaussian_tokenizer.synthetic.source import PLAIN


@pytest.fixture(scope="session")
def small_head() -> HeadModel:
    return build_procedural_head(600)


@pytest.fixture(scope="session")
def tracked(tmp_path_factory) -> Path:
    """A subject folder: 4 timesteps from 6 cameras, images of 40 pixels with alpha and masks. Not to be changed."""
    folder = tmp_path_factory.mktemp("tracked")
    settings = {"image_size": 40, "views": 6, "timesteps": 4, "num_points": 60, "seed": 3, "placement": "regular"}
    return synthesize(folder, 1, **settings, **PLAIN)[0]


@pytest.fixture
def copy_of_tracked(tracked, tmp_path) -> Path:
    return Path(shutil.copytree(tracked, tmp_path / "ada"))


@pytest.fixture
def change_frames() -> Callable[..., None]:
    """Call `change(entry)` on every frame in every transforms*.json of a folder, or on those of `row`."""

    def apply(folder: Path, change: Callable[[dict], None], row: int | None = None) -> None:
        for path in folder.glob("transforms*.json"):
            content = json.loads(path.read_text())
            chosen = content["frames"] if row is None else content["frames"][row : row + 1]
            for entry in chosen:
                change(entry)
            path.write_text(json.dumps(content))

    return apply
