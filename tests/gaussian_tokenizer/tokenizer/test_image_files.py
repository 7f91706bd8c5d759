"""Images from anywhere: looked at before they are decoded, one in memory at a time."""

import io
import struct
import weakref
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gaussian_tokenizer.captures.checks import find_problems
from gaussian_tokenizer.captures.frame import Frame, load_image, size_of_image
from gaussian_tokenizer.captures.loading import read_tracking
from gaussian_tokenizer.corpus.sources import _check_image
from gaussian_tokenizer.tokenizer.image_files import image_size, open_image, verify_image
from gaussian_tokenizer.tokenizer.processing_conditions import pixel_values


def png(width: int, height: int) -> bytes:
    """A whole gray PNG of zeros, packed without ever being in memory."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(width + 1)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def bomb(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bomb") / "bomb.png"
    path.write_bytes(png(12_500, 12_500))
    return path


DOORS = {
    "open_image": open_image,
    "image_size": image_size,
    "verify_image": verify_image,
    "its bytes": lambda path: open_image(path.read_bytes()),
    "load_image": load_image,
    "size_of_image": size_of_image,
    "pixel_values": lambda path: pixel_values(str(path), 28),
    "the corpus builder": lambda path: _check_image(
        Frame(0, 0, np.eye(4), 1, 1, 1, 1, 1, 1, path, path), path.read_bytes()
    ),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("door", DOORS)
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(bomb, door, monkeypatch):
    assert bomb.stat().st_size < 500_000
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match="12500x12500 pixels, expected at most 67,108,864; scale it down"):
        DOORS[door](bomb)


def test_formats_that_start_other_programs_are_not_tried(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(ValueError, match=r"a\.png is not a readable image: not one of PNG, JPEG"):
        open_image(path)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM"])
def test_the_usual_formats_open_from_files_and_bytes(tmp_path, form):
    Image.new("RGB", (5, 4), (250, 10, 10)).save(tmp_path / "a", format=form)
    for source in (tmp_path / "a", str(tmp_path / "a"), (tmp_path / "a").read_bytes()):
        verify_image(source)
        assert image_size(source) == open_image(source).size == (5, 4)
    assert np.abs(np.asarray(open_image(tmp_path / "a").convert("RGB"))[0, 0].astype(int) - (250, 10, 10)).max() < 5


def test_an_image_that_is_cut_short_or_missing_is_named(tmp_path):
    stream = io.BytesIO()
    Image.effect_noise((50, 50), 90).save(stream, "PNG")
    (tmp_path / "a.png").write_bytes(stream.getvalue()[:500])
    with pytest.raises(ValueError, match=r"a\.png is not a readable image"):
        open_image(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match=r"b\.png does not exist"):
        open_image(tmp_path / "b.png")


def test_the_checks_of_a_tracking_hold_one_image_at_a_time(copy_of_tracked, small_head, monkeypatch):
    """4K frames: sixteen of them as float32 RGBA are 2.1 GB; alive at any time may be an image and its mask."""
    alive, most = [], 0

    def counting(path):
        nonlocal most
        image = open_image(path)
        alive.append(weakref.ref(image))
        most = max(most, sum(reference() is not None for reference in alive))
        return image

    monkeypatch.setattr("gaussian_tokenizer.captures.checks.load_image", counting)
    assert find_problems(read_tracking(copy_of_tracked, small_head), small_head) == []
    assert 1 <= most <= 2
