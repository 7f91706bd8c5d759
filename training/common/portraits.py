"""Portraits of training: backgrounds, and with `--augment_portraits` light, color and flaws as photographs have them.

A synthetic or matted portrait is laid on a color, a gradient, noise or another subject's portrait; its colors change by
`ColorChange`, and those of the target frames with them; it is blurred, compressed and noisy; its alpha may be lost.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from gaussian_tokenizer.tokenizer.processing_conditions import upright

UNKNOWN_ALPHA = 0.25  # share of plain portraits of training whose alpha is hidden, as it is in a photograph
AUGMENTED_UNKNOWN_ALPHA = 0.5
BACKGROUNDS = {"color": 0.3, "gradient": 0.2, "noise": 0.2, "portrait": 0.3}  # how frequent
GAIN, BALANCE, GAMMA = (0.7, 1.3), (0.88, 1.12), (0.75, 1.33)
BLURRED, BLUR = 0.3, (0.3, 1.2)  # share; standard deviation in pixels of a portrait of 128, more in a larger one
COMPRESSED, QUALITY = 0.5, (35, 95)
NOISY, NOISE = 0.5, (0.0, 0.03)  # share; standard deviation of colors in 0..1


@dataclass(frozen=True, eq=False)
class ColorChange:
    """Exposure, white balance and tone curve of a camera: clip(gain * balance * color, 0, 1) ** gamma."""

    gain: float
    balance: np.ndarray  # (3,)
    gamma: float

    @classmethod
    def draw(cls, random: np.random.Generator) -> "ColorChange":
        gain, gamma = np.exp(random.uniform(*np.log((GAIN, GAMMA)).T))
        return cls(float(gain), random.uniform(*BALANCE, 3).astype(np.float32), float(gamma))

    def __call__(self, colors: np.ndarray) -> np.ndarray:
        """Colors (..., 3) in 0..1 -> float32 (..., 3)."""
        return np.clip(self.gain * self.balance * colors, 0, 1).astype(np.float32) ** np.float32(self.gamma)


class PortraitAugmentation:
    """What happens to the portrait of the item `index` of a training set, a function of the seed and the index alone.

    `other` gives a random portrait for a background. `color` is the change of colors that the targets of the item get too.
    """

    def __init__(self, seed: int, index: int, other: Callable[[np.random.Generator], Image.Image]):
        # 0 and 1 are the streams of `rows.shuffled_row`, 2 that of the numbers of references.
        self.random, self.other = np.random.default_rng((seed, 3, index)), other
        self.color = ColorChange.draw(self.random)

    def __call__(self, image: Image.Image) -> Image.Image:
        """RGBA image of the same size. To be called once for each image of the item: it takes random numbers."""
        whole = upright(image).convert("RGBA")
        colors, alpha = np.split(np.asarray(whole, np.float32) / 255, [3], axis=2)
        background = _background(whole.size, self.random, self.other)
        laid = _photographed(on_colors(self.color(colors), alpha, background), self.random)
        if self.random.random() < AUGMENTED_UNKNOWN_ALPHA:
            alpha = np.ones_like(alpha)
        return _to_image(np.concatenate((laid, alpha), 2))


def on_colors(colors: np.ndarray, alpha: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Colors composited with `alpha` over a background."""
    return colors * alpha + background * (1 - alpha)


def laid_on(portraits: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Portraits (K, 4, H, W) with their backgrounds, where there are any, of colors (K, 3); alpha stays."""
    alpha = portraits[:, 3:]
    return np.concatenate((on_colors(portraits[:, :3], alpha, colors[..., None, None]), alpha), axis=1)


def plain_portraits(portraits: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Portraits (K, 4, H, W) on random colors, in a share UNKNOWN_ALPHA of the cases with their alpha hidden."""
    portraits = laid_on(portraits, random.random((len(portraits), 3), np.float32))
    if random.random() < UNKNOWN_ALPHA:
        portraits[:, 3] = 1
    return portraits


def _background(
    size: tuple[int, int], random: np.random.Generator, other: Callable[[np.random.Generator], Image.Image]
) -> np.ndarray:
    """(H, W, 3) float32 in 0..1, for a `size` of width and height."""
    width, height = size
    kind = random.choice(list(BACKGROUNDS), p=list(BACKGROUNDS.values()))
    pure = random.random((2, 3), np.float32)
    gray = pure.mean(1, keepdims=True)
    first, second = gray + random.random((2, 1), np.float32) * (pure - gray)
    plain = np.broadcast_to(first, (height, width, 3))
    if kind == "color":
        return plain
    if kind == "gradient":
        y, x = np.mgrid[:height, :width].astype(np.float32) / max(size)
        angle = random.uniform(0, 2 * np.pi)
        ramp = np.cos(angle) * x + np.sin(angle) * y
        ramp = (ramp - ramp.min()) / max(float(np.ptp(ramp)), 1e-6)
        return first + ramp[..., None].astype(np.float32) * (second - first)
    if kind == "noise":  # from two large patches to fine grain
        cells = int(2 ** random.uniform(1, 6))
        grid = np.clip(first + random.uniform(0.05, 0.5) * random.standard_normal((cells, cells, 3)), 0, 1)
        return np.asarray(_to_image(grid).resize(size, Image.Resampling.BICUBIC), np.float32) / 255
    portrait = upright(other(random)).convert("RGBA").resize(size, Image.Resampling.BILINEAR)
    colors, alpha = np.split(np.asarray(portrait, np.float32) / 255, [3], axis=2)
    # Seldom in the same place as the one in front of it.
    laid = on_colors(ColorChange.draw(random)(colors), alpha, plain)
    return np.roll(laid, (random.integers(height), random.integers(width)), (0, 1))


def _photographed(colors: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Colors (H, W, 3) in 0..1 blurred, noisy and compressed, each in a share of the cases."""
    scale = max(colors.shape) / 128
    if random.random() < BLURRED:
        blur = ImageFilter.GaussianBlur(scale * random.uniform(*BLUR))
        colors = np.asarray(_to_image(colors).filter(blur), np.float32) / 255
    if random.random() < NOISY:
        deviation = random.uniform(*NOISE)
        colors = np.clip(colors + deviation * random.standard_normal(colors.shape, np.float32), 0, 1)
    if random.random() < COMPRESSED:
        file = io.BytesIO()
        _to_image(colors).save(file, format="JPEG", quality=int(random.integers(*QUALITY)))
        colors = np.asarray(Image.open(file), np.float32) / 255
    return colors


def _to_image(values: np.ndarray) -> Image.Image:
    """(H, W, 3 or 4) in 0..1 -> an image of 8 bits."""
    return Image.fromarray(np.rint(255 * values).astype(np.uint8))
