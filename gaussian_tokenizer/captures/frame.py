"""One image of a subject with its camera and the head parameters of its timestep."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.tokenizer.image_files import image_size, open_image

OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture of a subject: where its camera stood, and the head parameters at that moment.

    Read frames hold paths in `image`, `mask` and `params`; a frame to be written may also hold the pictures (PIL, or
    uint8: image (H, W, 3 or 4), mask (H, W)) and the `HeadParameters` of T = 1 themselves.
    """

    timestep: int
    camera: int
    viewmat: np.ndarray  # (4, 4) float64, world-to-camera, OpenCV axes, metres
    fx: float  # pixels
    fy: float
    cx: float  # pixels from the left edge
    cy: float  # pixels from the upper edge
    width: int
    height: int
    image: Path | Image.Image | np.ndarray
    params: Path | HeadParameters
    mask: Path | Image.Image | np.ndarray | None = None  # 255 where the person is

    @property
    def K(self) -> np.ndarray:
        """(3, 3) float64 intrinsics in pixels."""
        return np.array([[self.fx, 0, self.cx], [0, self.fy, self.cy], [0, 0, 1]], dtype=np.float64)

    def image_bytes(self) -> bytes:
        """The picture as a file: the bytes on the disk, or PNG of a picture in memory."""
        return file_bytes(self.image)

    def load_params(self) -> HeadParameters:
        return HeadParameters.load(self.params) if isinstance(self.params, Path) else self.params


def picture_size(picture: Path | Image.Image | np.ndarray) -> tuple[int, int]:
    """(width, height) in pixels; of a file only the header is read. ValueError if it is not a picture."""
    if isinstance(picture, np.ndarray):
        return picture.shape[1], picture.shape[0]
    if isinstance(picture, Image.Image):
        return picture.size
    return image_size(picture)


def open_picture(picture: Path | Image.Image | np.ndarray) -> Image.Image:
    """The picture, decoded; errors as of `image_files.open_image`."""
    if isinstance(picture, np.ndarray):
        return Image.fromarray(picture)
    if isinstance(picture, Image.Image):
        return picture
    return open_image(picture)


def has_alpha(image: Image.Image) -> bool:
    return "A" in image.getbands() or "transparency" in image.info


def file_bytes(picture: Path | Image.Image | np.ndarray) -> bytes:
    if isinstance(picture, Path):
        return picture.read_bytes()
    stream = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(stream, format="PNG")
    return stream.getvalue()
