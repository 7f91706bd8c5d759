"""What may be wrong with a tracking although every file can be read: `find_problems` checks up to 16 of its frames."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from gaussian_tokenizer.captures.frame import Frame, has_alpha, load_image
from gaussian_tokenizer.captures.projection import (
    CONVENTIONS,
    EXPECTED,
    Sample,
    as_if,
    is_inside,
    sample_frames,
    share_seen,
    silhouette,
)
from gaussian_tokenizer.captures.tracking import Tracking
from gaussian_tokenizer.heads.head_model import HeadModel

SAMPLES = 16
ENOUGH_SEEN = 0.5  # of the vertices, in the images on average
SMALLEST_HEAD = 0.002  # of the image
LONGEST = 128  # pixels, longer side of the silhouettes
BLACK = 4  # of 255
FAR_MM = 5.0  # mean distance of the heads of two sequences of one subject
REMEDY = {
    "camera-to-world with OpenCV axes": "negate the second and third column of its rotation",
    "world-to-camera with OpenCV axes": "invert it, then negate the second and third column of its rotation",
    "world-to-camera with OpenGL axes": "invert it",
}


@dataclass(frozen=True)
class Problem:
    """One line about a tracking; an error keeps it from being used, a warning does not."""

    text: str
    is_error: bool = True


warning = partial(Problem, is_error=False)


def find_problems(tracking: Tracking, head: HeadModel) -> list[Problem]:
    """Everything that is wrong with a tracking, errors first."""
    problems = [*_of_metadata(tracking, head), *_of_frames(tracking)]
    if tracking.frames:
        faces = head.faces.cpu().numpy()
        samples = sample_frames(tracking, head, SAMPLES)
        of_cameras = _of_cameras(tracking, samples, faces)
        heads: list[np.ndarray] = []
        if not any(problem.is_error for problem in of_cameras):
            heads = [silhouette(each.vertices, faces, each.frame, each.frame.viewmat, LONGEST) for each in samples]
            of_cameras += _of_size(samples, heads)
        problems += [*of_cameras, *_of_images(tracking, samples, heads)]
    return sorted(problems, key=lambda problem: not problem.is_error)


def best_convention(samples: list[Sample]) -> tuple[str, dict[str, float]]:
    """The convention in which the cameras see most of the head, and what share of it they see in each."""
    seen = {
        name: float(np.mean([share_seen(each.vertices, each.frame, as_if(each.frame, name)) for each in samples]))
        for name in CONVENTIONS
    }
    return max(seen, key=lambda name: seen[name]), seen


def _of_metadata(tracking: Tracking, head: HeadModel) -> Iterator[Problem]:
    name, digest = (tracking.metadata.get(key) for key in ("head_name", "head_hash"))
    if digest is not None and digest != head.hash:
        made_on = f"head model {name!r} (hash {digest}), not on {head.name!r} (hash {head.hash})"
        yield Problem(f"was made on {made_on}; give the head model it was made on")
    distances = tracking.metadata["sequence_distances_mm"] if tracking.kind == "union" else {}
    far = {sequence: distance for sequence, distance in distances.items() if distance > FAR_MM}
    if far:
        found = ", ".join(f"{sequence} {distance:.1f} mm" for sequence, distance in far.items())
        yield warning(f"heads of some sequences are far from the first one's on average ({found}); is it one subject?")


def _of_frames(tracking: Tracking) -> Iterator[Problem]:
    frames = tracking.frames
    if not frames:
        yield Problem("has head parameters, but no images beside them; copy its folder of images there")
        return
    sizes = Counter((frame.width, frame.height) for frame in frames)
    if len(sizes) > 1:
        found = ", ".join(f"{count} of {width}x{height}" for (width, height), count in sizes.most_common())
        yield Problem(f"has images of different sizes: {found}; resize them to one")
    if not tracking.splits["train"]:
        yield Problem("has no frames to train on: its train split is empty")
    unused = len(frames) - len({index for indices in tracking.splits.values() for index in indices})
    if unused:
        yield warning(f"{unused} of {len(frames)} frames are in no split")
    keys = {frame.key for frame in frames}
    cameras = sorted({frame.camera for frame in frames})
    holes = [(t, camera) for t in tracking.timesteps for camera in cameras if (t, camera) not in keys]
    if holes and tracking.kind != "union":
        timestep, camera = holes[0]
        yield warning(f"{len(holes)} images are missing, the first of timestep {timestep} from camera {camera}")


def _of_cameras(tracking: Tracking, samples: list[Sample], faces: np.ndarray) -> list[Problem]:
    inside = [
        each.frame for each in samples if is_inside(np.linalg.inv(each.frame.viewmat)[:3, 3], each.vertices, faces)
    ]
    if inside:
        first = f"camera {inside[0].camera} at timestep {inside[0].timestep}"
        text = f"{len(inside)} of {len(samples)} sampled cameras are inside the head, the first is {first}"
        return [Problem(f"{text}; expected cameras around it, in meters")]
    best, seen = best_convention(samples)
    if seen[EXPECTED] >= ENOUGH_SEEN:
        blind = [
            f"camera {frame.camera} at timestep {frame.timestep}"
            for _, frame, vertices in samples
            if share_seen(vertices, frame, frame.viewmat) < 0.1
        ]
        return [warning(f"{', '.join(blind)}: sees nothing of the head")] if blind else []
    text = f"the cameras do not see the head: {seen[EXPECTED]:.0%} of it is in the images"
    if tracking.kind not in ("vhap", "monocular", "union"):
        return [Problem(f"{text}; are the head parameters those of these images?")]
    expected = f"expected {EXPECTED} (x right, y up, z backward) in meters"
    if seen[best] < ENOUGH_SEEN:
        return [Problem(f"{text}; {expected}, and no other convention fits either")]
    # A camera straight in front of the face has the same matrix in two conventions.
    fitting = [name for name in CONVENTIONS if seen[name] > seen[best] - 0.02]
    would = f"{seen[best]:.0%} would be, were transform_matrix {' or '.join(fitting)}"
    return [Problem(f"{text}; {would}; {expected}: {REMEDY[fitting[0]]}")]


def _of_size(samples: list[Sample], heads: list[np.ndarray]) -> list[Problem]:
    covered = np.mean([head.mean() for head in heads])
    if covered >= SMALLEST_HEAD:
        return []
    distance = np.median([np.linalg.norm(each.frame.viewmat[:3, 3]) for each in samples])
    text = f"the head covers {covered:.2%} of the images, the cameras are {distance:.3g} m away"
    return [Problem(f"{text}; are their translations in millimeters? expected meters")]


def _of_images(tracking: Tracking, samples: list[Sample], heads: list[np.ndarray]) -> Iterator[Problem]:
    """`heads` (h, w) bool: where the head is in each of the samples; empty if that is not known."""
    shapes = [head.shape for head in heads] or [(1, 1)] * len(samples)
    try:
        images = [_decode(each.frame, shape) for each, shape in zip(samples, shapes)]
        black = all(image.is_black for image in images)
        black = black and all(_decode(frame, (1, 1)).is_black for frame in tracking.frames)
    except (ValueError, FileNotFoundError) as error:
        yield Problem(str(error))
        return
    for what, name in (("the masks (fg_masks) are", "mask"), ("the alpha of the images is", "alpha")):
        masks = [getattr(image, name) for image in images]
        pairs = [(mask, head) for mask, head in zip(masks, heads) if mask is not None]
        yield from _of_masks(what, pairs) if pairs else ()
    if black:
        yield Problem("every image is black; export the images again")
    without = [each.frame for each, image in zip(samples, images) if image.alpha is None and image.mask is None]
    if len(without) == len(samples):
        yield warning("no masks, and images without alpha: the background counts as part of the subject")
    elif without:
        first = f"timestep {without[0].timestep} from camera {without[0].camera}"
        text = f"masks are missing for {len(without)} of {len(samples)} sampled images, the first of {first}"
        yield Problem(f"{text}; export the data again with all masks")


def _of_masks(what: str, pairs: list[tuple[np.ndarray, np.ndarray]]) -> Iterator[Problem]:
    """`pairs` of a mask (h, w) in 0..1 and where the head is, (h, w) bool."""
    inside = float(np.mean([mask[head].mean() for mask, head in pairs if head.any()]))
    outside = float(np.mean([mask[~head].mean() for mask, head in pairs if not head.all()] or [0.0]))
    if inside < 0.5:
        found = f"mean {inside:.2f} on the projected head, {outside:.2f} around it"
        kind = "inverted" if outside > inside + 0.2 else "not on the head"
        yield Problem(f"{what} {kind}: {found}; expected white on the subject")


class _Decoded(NamedTuple):
    """What the checks keep of an image, so that one is in memory at a time."""

    is_black: bool  # no pixel of the subject is lighter than BLACK
    alpha: np.ndarray | None  # (h, w) in 0..1, of the image itself
    mask: np.ndarray | None  # (h, w) in 0..1, of the file beside it


def _decode(frame: Frame, shape: tuple[int, ...]) -> _Decoded:
    image = load_image(frame.image)
    mask = None if frame.mask is None else load_image(frame.mask).convert("L")
    alpha = image.convert("RGBA").getchannel("A") if has_alpha(image) else None
    seen = Image.new("RGB", image.size)
    seen.paste(image.convert("RGB"), mask=mask if alpha is None else alpha)
    is_black = max(highest for _, highest in seen.getextrema()) <= BLACK  # type: ignore[misc]
    return _Decoded(is_black, _shrunk(alpha, shape), _shrunk(mask, shape))


def _shrunk(mask: Image.Image | None, shape: tuple[int, ...]) -> np.ndarray | None:
    if mask is None:
        return None
    return np.asarray(mask.resize((shape[1], shape[0]), Image.Resampling.BOX), np.float32) / 255
