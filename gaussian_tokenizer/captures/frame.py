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
    """One image of a subject: where its camera stood, and the head parameters at that moment.

    Read frames hold paths in `image`, `mask` and `params`; a frame to be written may also hold the images (PIL, or
    uint8: image (H, W, 3 or 4), mask (H, W)) and the `HeadParameters` of T = 1 themselves.
    """

    timestep: int
    camera: int
    viewmat: np.ndarray  # (4, 4) float64, world-to-camera, OpenCV axes, meters
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
        """The image as a file: the bytes on the disk, or PNG of an image in memory."""
        return file_bytes(self.image)

    def load_params(self) -> HeadParameters:
        return HeadParameters.load(self.params) if isinstance(self.params, Path) else self.params


def size_of_image(image: Path | Image.Image | np.ndarray) -> tuple[int, int]:
    """(width, height) in pixels; of a file only the header is read. ValueError if it is not an image."""
    if isinstance(image, np.ndarray):
        return image.shape[1], image.shape[0]
    if isinstance(image, Image.Image):
        return image.size
    return image_size(image)


def load_image(image: Path | Image.Image | np.ndarray) -> Image.Image:
    """The image, decoded; errors as of `image_files.open_image`."""
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    if isinstance(image, Image.Image):
        return image
    return open_image(image)


def has_alpha(image: Image.Image) -> bool:
    return "A" in image.getbands() or "transparency" in image.info


def file_bytes(image: Path | Image.Image | np.ndarray) -> bytes:
    if isinstance(image, Path):
        return image.read_bytes()
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, format="PNG")
    return stream.getvalue()
