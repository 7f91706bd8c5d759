"""Image files, opened safely: a list of formats and a limit of pixels that is checked before decoding.

Some of Pillow's formats start other programs (EPS). Travels with checkpoints.
"""

import io
import os
from collections.abc import Callable
from pathlib import Path

from PIL import Image, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
MAX_PIXELS = 2**26  # 8192 x 8192, 256 MiB as RGBA; a file of 445 kB may hold 12,500 x 12,500


def open_image(source: str | os.PathLike | bytes) -> Image.Image:
    """An image file, or its bytes, decoded; of an animation the first frame.

    FileNotFoundError if there is no such file; ValueError for anything but a whole image of FORMATS and MAX_PIXELS.
    """
    return _read(source, lambda image: image.load())


def image_size(source: str | os.PathLike | bytes) -> tuple[int, int]:
    """(width, height) in pixels, from the header alone; errors as of `open_image`."""
    return _read(source, lambda image: None).size


def verify_image(source: str | os.PathLike | bytes) -> None:
    """Raise as `open_image` does, where the damage can be seen without decoding (checksums, size)."""
    _read(source, lambda image: image.verify())


def _read(source: str | os.PathLike | bytes, use: Callable[[Image.Image], object]) -> Image.Image:
    name = "the image" if isinstance(source, bytes) else os.fspath(source)
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise FileNotFoundError(f"{name} does not exist")
    Image.init()  # registers all formats
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels, expected at most {MAX_PIXELS:,}; scale it down")
            use(image)
            return image
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not a readable image: not one of {', '.join(FORMATS)}") from None
    # Pillow has a dozen kinds for a damaged file: OSError, SyntaxError, struct.error, OverflowError, MemoryError ...
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name} is not a readable image: {reason}") from None
