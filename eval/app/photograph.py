"""One photograph in the app: opened safely, landmarks placed on it, and the head fitted to them.

The landmarks come from a file, from MediaPipe, or one by one from clicks; any of them can be moved afterwards.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from gaussian_tokenizer.captures.contact_sheet import draw_head
from gaussian_tokenizer.captures.frame import Frame
from gaussian_tokenizer.captures.portrait import PortraitFit, fit_portrait
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.heads.landmarks import N_LANDMARKS
from gaussian_tokenizer.rendering.cameras import Cameras
from gaussian_tokenizer.tokenizer.processing_conditions import upright

MAX_SIDE = 1024  # pixels: larger photographs are scaled down
# What a visitor is asked to click, with the numbers of the landmarks. "Left" is that of the picture.
CLICKS = {
    "outer corner of the eye on the left": 36,
    "inner corner of the eye on the left": 39,
    "inner corner of the eye on the right": 42,
    "outer corner of the eye on the right": 45,
    "tip of the nose": 30,
    "corner of the mouth on the left": 48,
    "corner of the mouth on the right": 54,
    "lowest point of the chin": 8,
    "middle of the upper lip's upper edge": 51,
    "middle of the lower lip's lower edge": 57,
}
OPTIONAL = 2  # the last ones, for better proportions


class Photograph:
    """`points` (68, 2) in its pixels, those with `confidences` (68,) above 0 known; `asked`: the landmarks still to be clicked."""

    def __init__(self, path: str | Path) -> None:
        """ValueError if the file is not an image, or too large."""
        image = upright(path)
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        self.scale = min(1.0, MAX_SIDE / max(image.size))
        self.image = image.resize([max(1, round(side * self.scale)) for side in image.size], Image.Resampling.LANCZOS)
        self.clear()

    def clear(self) -> None:
        """Forget all landmarks and ask for them again."""
        self.points, self.confidences = np.zeros((N_LANDMARKS, 2)), np.zeros(N_LANDMARKS)
        self.asked, self.clicked = [*CLICKS.values()], list[int]()
        self.found: PortraitFit | None = None

    def click(self, x: float, y: float) -> None:
        """Place the landmark that is asked for, or else move the nearest one."""
        if self.asked:
            index = self.asked.pop(0)
            self.clicked.append(index)
        else:
            far = np.where(self.confidences > 0, np.linalg.norm(self.points - (x, y), axis=1), np.inf)
            index = int(far.argmin())
        self.points[index], self.confidences[index] = (x, y), 1.0

    def undo(self) -> None:
        """Ask again for the landmark clicked last."""
        if self.clicked:
            self.asked.insert(0, self.clicked.pop())
            self.confidences[self.asked[0]] = 0.0

    def use(self, landmarks: np.ndarray, confidences: np.ndarray | None, head: HeadModel) -> None:
        """Take landmarks (68, 2) or (51, 2) in pixels of the file, and their confidences; ValueError as of `fit_portrait`."""
        size = (round(self.image.height / self.scale), round(self.image.width / self.scale))
        fit_portrait(landmarks, head, size, confidences=confidences)
        self.clear()
        self.asked = []
        self.points[-len(landmarks) :] = landmarks * self.scale
        self.confidences[-len(landmarks) :] = 1.0 if confidences is None else confidences

    def fit(self, head: HeadModel) -> None:
        """Fit the head to the landmarks, once there are enough; ValueError if they cannot be those of a face."""
        self.found = None
        if len(self.asked) <= OPTIONAL:
            size = (self.image.height, self.image.width)
            self.found = fit_portrait(self.points, head, size, confidences=self.confidences)

    def marked(self) -> Image.Image:
        """RGB: the photograph with its landmarks."""
        image = Image.new("RGBA", self.image.size, "white")
        image.alpha_composite(self.image.convert("RGBA"))
        draw = ImageDraw.Draw(image)
        radius = max(image.size) / (130 if self.clicked else 220)
        for x, y in self.points[self.confidences > 0]:
            draw.circle((x, y), radius + 1, fill="white")
            draw.circle((x, y), radius, fill=(0, 150, 90))
        return image.convert("RGB")

    def with_head(self, head: HeadModel) -> Image.Image:
        """RGB: the fitted head over the portrait."""
        image, params, camera = self.portrait(head)
        fx, cx, fy, cy = camera.Ks[0, [0, 0, 1, 1], [0, 2, 1, 2]].tolist()
        viewmat = camera.viewmats[0].double().numpy()
        return draw_head(Frame(0, 0, viewmat, fx, fy, cx, cy, *image.size, image, params), head)

    def portrait(self, head: HeadModel) -> tuple[Image.Image, HeadParameters, Cameras]:
        """What the pipeline is given: a square around the head, framed as in training, with head parameters and camera."""
        assert self.found is not None
        image, camera = self.found.crop(self.image, head)
        return image, self.found.params, camera
