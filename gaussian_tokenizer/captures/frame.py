"""One image of a subject with its camera and the head parameters of its timestep.

Cameras are world-to-camera with OpenCV axes (x right, y down, z forward); those in the files of trackers have OpenGL axes.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.tokenizer.image_files import image_size, open_image

AnyImage = Path | Image.Image | np.ndarray  # a file, decoded, or uint8 (H, W) or (H, W, 3 or 4)

OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])  # its own inverse


@dataclass(frozen=True, eq=False)
class Frame:
    """Frames that are read hold paths in `image`, `mask` and `params`; frames to be written may hold the data (T = 1)."""

    timestep: int
    camera: int
    viewmat: np.ndarray  # (4, 4) float64, world-to-camera, OpenCV axes, meters
    fx: float  # pixels
    fy: float
    cx: float  # pixels from the left edge
    cy: float  # pixels from the upper edge
    width: int
    height: int
    image: AnyImage
    params: Path | HeadParameters
    mask: AnyImage | None = None  # 255 on the subject

    @property
    def key(self) -> tuple[int, int]:
        """Timestep and camera: what tells the frames of a subject apart."""
        return self.timestep, self.camera

    @property
    def K(self) -> np.ndarray:
        """(3, 3) float64 intrinsics in pixels."""
        return np.array([[self.fx, 0, self.cx], [0, self.fy, self.cy], [0, 0, 1]], dtype=np.float64)

    def image_bytes(self) -> bytes:
        """The bytes of the image file; an image in memory is encoded as PNG."""
        return file_bytes(self.image)

    def load_params(self) -> HeadParameters:
        return HeadParameters.load(self.params) if isinstance(self.params, Path) else self.params


def size_of_image(image: AnyImage) -> tuple[int, int]:
    """(width, height) in pixels; of a file only the header is read. ValueError if it is not an image."""
    return image_size(image) if isinstance(image, Path) else load_image(image).size


def load_image(image: AnyImage) -> Image.Image:
    """The image, decoded; errors as of `image_files.open_image`."""
    if isinstance(image, Path):
        return open_image(image)
    return Image.fromarray(image) if isinstance(image, np.ndarray) else image


def has_alpha(image: Image.Image) -> bool:
    return "A" in image.getbands() or "transparency" in image.info


def file_bytes(image: AnyImage) -> bytes:
    if isinstance(image, Path):
        return image.read_bytes()
    stream = io.BytesIO()
    load_image(image).save(stream, format="PNG")
    return stream.getvalue()
