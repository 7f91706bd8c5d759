"""The head in a photograph: shape, expression, jaw and camera from the 2D landmarks of one face.

Projected landmarks of the head model are brought to those of the image by robust least squares. What one view leaves open is
decided by priors: identity coefficients are standard normal, expressions and jaw are small, the camera is about a meter away.
The jaw line that annotators and detectors draw on a turned head is its outline, so these landmarks may slide over the cheek
("landmark marching", Zhu et al. 2015). Levenberg-Marquardt in float64, with the derivatives of automatic differentiation.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gaussian_tokenizer.geometry.rotations import axis_angle_to_matrix
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.heads.landmarks import N_JAW, N_LANDMARKS
from gaussian_tokenizer.rendering.cameras import Cameras

NOISE_PIXELS, NOISE_METERS = 0.5, 0.0012  # standard deviation of a landmark: of its pixel, and of its place on the head
OUTLIER = 2.5  # standard deviations from which on a landmark counts linearly, not quadratically
JAW_NOISE = 2.0  # times that of the other landmarks: nobody knows where along the outline they are
DISTANCE, DISTANCE_SPREAD = 1.0, 0.4  # meters, and the standard deviation of its logarithm
JAW_SPREAD = (0.2, 0.03, 0.03)  # radians about x, y, z
EXPRESSION_SPREAD, NEGATIVE_SPREAD = 0.5, 0.1  # of weights that mean 0 (none) to 1 (full)
ROW = np.linspace(0.5, 0.95, 10)  # where a jaw landmark may slide: from the nose (0) to its own place (1)
SMALL_FACE = 48  # pixels
FAR_OUTSIDE = 1.0  # widths of the image
FEWEST = 6  # landmarks, beside those of the jaw: eyes, nose and mouth
LARGE_ERROR = 0.045  # root mean square, in units of the size of the face
SLIDES = 3  # times that the places of the jaw's landmarks are chosen, each time followed by a fit
ROOM = 1.5  # side of the square around a head, in heights of the skull
POSE = 7  # unknowns of the camera: turn (3), shift (2), logarithms of scale (pixels per meter) and distance (meters)


@dataclass(frozen=True, eq=False)
class PortraitFit:
    """What `fit_portrait` found. The world is the head's: the camera carries the pose, `params` have none.

    The neck and the eyes are at rest, because landmarks do not show them.
    """

    camera: Cameras  # C = 1, principal point in the middle of the image
    params: HeadParameters  # T = 1
    landmarks: Tensor  # (K, 2) pixels, of the fitted head; those of the jaw where they slid to
    residuals: Tensor  # (K,) pixels from the given landmarks
    rms: float  # pixels, root mean square of those with a confidence
    warnings: tuple[str, ...]  # empty if the fit is plausible

    def crop(self, image: Image.Image, head: HeadModel) -> tuple[Image.Image, Cameras]:
        """The square around the head in the image that was fitted, framed as portraits of training are, and its camera.

        What lies outside the image is transparent, or white if the image has no alpha.
        """
        skull = ~head.regions["neck"].cpu() if "neck" in head.regions else slice(None)
        vertices = head.canonical_vertices(self.params.to(head.device)).cpu()[skull]
        low, high = vertices.amin(0), vertices.amax(0)
        seen = self.camera.viewmats[0, :3, :3] @ ((low + high) / 2) + self.camera.viewmats[0, :3, 3]
        x, y, _ = (self.camera.Ks[0] @ seen / seen[2]).tolist()
        side = max(8, round(ROOM * float((high[1] - low[1]) * self.camera.Ks[0, 1, 1] / seen[2])))
        left, top = round(x - side / 2), round(y - side / 2)
        square = Image.new("RGBA", (side, side), (255, 255, 255, 0 if image.has_transparency_data else 255))
        square.paste(image, (-left, -top))
        Ks = self.camera.Ks.clone()
        Ks[0, :2, 2] -= Ks.new_tensor((left, top))
        camera = dataclasses.replace(self.camera, Ks=Ks, width=side, height=side)
        return square if image.has_transparency_data else square.convert("RGB"), camera


def fit_portrait(
    landmarks: Any,
    head: HeadModel,
    image_size: tuple[int, int],
    focal: float | None = None,
    confidences: Any = None,
) -> PortraitFit:
    """Fit a head model with landmarks to the face in an image.

    landmarks: (68, 2) pixels x, y in iBUG's order, or the (51, 2) without the jaw; pixel centers are at + 0.5.
    image_size: height and width. focal: pixels; None estimates it, which one image determines only roughly.
    confidences: (68,) or (51,) weights from 0, such as a detector's. A landmark with confidence 0 may be anywhere: corners of
    eyes and mouth, the tip of the nose and the chin are enough for pose and proportions.
    ValueError for landmarks that cannot be those of a face in this image. A fit that converged but looks wrong is returned
    with `warnings`.
    """
    height, width = image_size
    pixels, confidence = _checked(landmarks, confidences, height, width)
    inner = N_LANDMARKS - N_JAW
    if len(head.landmark_faces) not in (N_LANDMARKS, inner):
        raise ValueError(
            f"head model {head.name!r} has {len(head.landmark_faces)} landmarks, expected 68 or 51; FLAME gets them from its "
            "embedding file (heads.landmarks.with_landmarks, --landmark_embedding)"
        )
    if focal is not None and not 0 < focal < math.inf:
        raise ValueError(f"focal is {focal}, expected pixels above 0, or None")
    if len(head.landmark_faces) == inner or len(pixels) == inner:
        pixels, confidence = pixels[-inner:], confidence[-inner:]
    problem = _Problem(head, pixels, confidence, (width / 2, height / 2), focal)
    x = problem.minimize(problem.start, POSE, tolerance=1e-2)
    for _ in range(SLIDES if len(pixels) == N_LANDMARKS else 1):
        if len(pixels) == N_LANDMARKS:
            problem.slide(x)
        x = problem.minimize(x)
    found = problem.project(x)[problem.chosen]
    residuals = (found - problem.pixels).norm(dim=1)
    rms = float(residuals[torch.from_numpy(confidence) > 0].square().mean().sqrt())
    camera, params = problem.result(x, width, height)
    size = float(np.ptp(pixels[confidence > 0], axis=0).max())
    warnings = []
    if camera.viewmats[0, 2, 2] > 0:
        warnings.append(
            "the head faces away from the camera: the landmarks look mirrored; the subject's right side comes first"
        )
    if size < SMALL_FACE:
        warnings.append(f"the face is {size:.0f} pixels large: shape and expression are uncertain below {SMALL_FACE}")
    if rms > LARGE_ERROR * size:
        warnings.append(
            f"the landmarks are {rms:.1f} pixels from those of the head, {rms / size:.1%} of the face, expected less than "
            f"{LARGE_ERROR:.1%}: are they of a human face, in iBUG's order?"
        )
    return PortraitFit(camera, params, found.float(), residuals.float(), rms, tuple(warnings))


def _checked(landmarks: Any, confidences: Any, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (K, 2) and confidences (K,), float64; ValueError for what cannot be a face in the image."""
    pixels = np.asarray(landmarks, np.float64)
    if pixels.shape not in ((N_LANDMARKS, 2), (N_LANDMARKS - N_JAW, 2)):
        raise ValueError(
            f"landmarks are {pixels.shape}, expected (68, 2) in iBUG's order or the (51, 2) without the jaw"
        )
    if not np.isfinite(pixels).all():
        row = int(np.argwhere(~np.isfinite(pixels))[0, 0])
        raise ValueError(
            f"landmark {row} is {pixels[row].tolist()}; give one that is not seen any place and confidence 0"
        )
    confidence = np.ones(len(pixels)) if confidences is None else np.asarray(confidences, np.float64)
    if confidence.shape != pixels.shape[:1] or not np.isfinite(confidence).all() or confidence.min() < 0:
        raise ValueError(f"confidences are {confidence.shape}, expected ({len(pixels)},) numbers from 0")
    inner = slice(N_JAW - N_LANDMARKS, None)
    seen = pixels[inner][confidence[inner] > 0]
    if len(seen) < FEWEST:
        raise ValueError(
            f"{len(seen)} of the 51 landmarks without the jaw have a confidence, expected at least {FEWEST}"
        )
    low, middle, high, size = seen.min(0), seen.mean(0), seen.max(0), np.array([width, height])
    span = f"landmarks from x {low[0]:.4g}, y {low[1]:.4g} to x {high[0]:.4g}, y {high[1]:.4g}"
    if np.linalg.svd(seen - middle, compute_uv=False)[1] < 1.0:
        raise ValueError(f"{span} are on a point or a line; expected pixels, not fractions of the image")
    if (np.maximum(-low, high - size) > FAR_OUTSIDE * size).any() or (middle < 0).any() or (middle > size).any():
        raise ValueError(f"{span} are outside the image of {width}x{height}; are they of another size of this image?")
    return pixels, confidence


class _Problem:
    """The unknowns x: pose (7), jaw (3), shape (S), expression (E); and how far they bring the head from the landmarks."""

    def __init__(
        self,
        head: HeadModel,
        pixels: np.ndarray,
        confidence: np.ndarray,
        principal: tuple[float, float],
        focal: float | None,
    ) -> None:
        self.pixels = torch.from_numpy(pixels)
        self.principal = torch.tensor(principal, dtype=torch.float64)
        self.focal = focal
        self.head = _landmarks_alone(head, len(pixels))
        points = self.head.landmarks(self.head.template)[: len(pixels)]
        self.chosen = torch.arange(len(pixels))  # of the points of `self.head`, that of each landmark
        self.pivot = points.mean(0)
        jaw = len(pixels) - (N_LANDMARKS - N_JAW)
        # Weak perspective: pixels = A (points - pivot) + b. The rows of A, made orthonormal, are axes of the camera.
        inner = np.sqrt(confidence[jaw:, None])
        system = np.concatenate(((points - self.pivot).numpy()[jaw:], np.ones((len(inner), 1))), 1)
        solution = np.linalg.lstsq(inner * system, inner * pixels[jaw:], rcond=None)[0]
        left, values, right = np.linalg.svd(solution[:3].T, full_matrices=False)
        axes = left @ right
        self.rotation = torch.from_numpy(np.concatenate((axes, np.cross(*axes)[None])))
        self.center = torch.from_numpy(solution[3])  # where the pivot is in the image, pixels
        scale = float(values.mean())
        noise = (NOISE_PIXELS + NOISE_METERS * scale) * np.where(np.arange(len(pixels)) < jaw, JAW_NOISE, 1.0)
        self.weights = torch.from_numpy(np.sqrt(confidence) / noise)
        self.start = torch.zeros(POSE + 3 + head.n_shape + head.n_expression, dtype=torch.float64)
        self.start[5], self.start[6] = math.log(scale), math.log(DISTANCE)
        self.size = scale * 0.1  # pixels per unit of shift
        spread = torch.ones_like(self.start)
        spread[:6], spread[6] = math.inf, DISTANCE_SPREAD
        spread[POSE : POSE + 3] = torch.tensor(JAW_SPREAD)
        negative = spread.clone()
        negative[POSE] = JAW_SPREAD[1]  # a jaw opens, it does not close further
        if head.expression_names[:1] != ("expression_000",):  # FLAME's are principal components of either sign
            spread[len(spread) - head.n_expression :] = EXPRESSION_SPREAD
            negative[len(spread) - head.n_expression :] = NEGATIVE_SPREAD
        self.precision, self.negative_precision = spread**-2, negative**-2
        self.mean = torch.where(torch.arange(len(spread)) == 6, self.start, 0)

    def lens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Focal length in pixels and distance of the pivot in meters."""
        scale = x[5].exp()
        distance = x[6].exp() if self.focal is None else self.focal / scale
        return scale * distance, distance

    def params(self, x: Tensor) -> HeadParameters:
        """T = 1, with the pose at rest but for the jaw."""
        jaw, shape, expression = x[POSE:].split((3, self.head.n_shape, self.head.n_expression))
        rest = x.new_zeros(1, 3)
        return HeadParameters(shape, expression[None], rest, rest, jaw[None], x.new_zeros(1, 6), rest)

    def translation(self, x: Tensor) -> Tensor:
        """(3,) meters: the pivot as the camera sees it."""
        focal, distance = self.lens(x)
        aside = (self.center + self.size * x[3:5] - self.principal) * distance / focal
        return torch.cat((aside, distance[None]))

    def project(self, x: Tensor) -> Tensor:
        """(P, 2) pixels: the landmarks, and the points of the rows over which those of the jaw slide."""
        points = self.head.landmarks(self.head.pose(self.params(x)).vertices[0])
        rotation = axis_angle_to_matrix(x[:3]) @ self.rotation
        seen = (points - self.pivot) @ rotation.T + self.translation(x)
        return self.principal + self.lens(x)[0] * seen[:, :2] / seen[:, 2:]

    def slide(self, x: Tensor) -> None:
        """Choose for each landmark of the jaw its own place or that on the outline, whichever is nearer to the pixel."""
        points = self.project(x)
        indices = torch.cat((torch.arange(N_JAW)[:, None], torch.arange(N_LANDMARKS, len(points)).view(N_JAW, -1)), 1)
        rows, jaw = points[indices], self.pixels[:N_JAW]  # (17, R, 2)
        inner = slice(N_JAW, None)
        seen = self.weights[inner] > 0
        outward = jaw - self.pixels[inner][seen].mean(0)
        outline = torch.einsum("jrc,jc->jr", rows, outward).argmax(1)
        every = torch.arange(N_JAW)
        nearer = (rows[every, outline] - jaw).norm(dim=1) < (rows[:, 0] - jaw).norm(dim=1)
        self.chosen[:N_JAW] = indices[every, torch.where(nearer, outline, 0)]

    def residuals(self, x: Tensor) -> Tensor:
        """(K, 2) standard deviations."""
        return (self.project(x)[self.chosen] - self.pixels) * self.weights[:, None]

    def minimize(self, x: Tensor, free: int | None = None, tolerance: float = 1e-5, steps: int = 40) -> Tensor:
        """Levenberg-Marquardt over the first `free` unknowns (None: all), iteratively reweighted.

        It ends when a step lowers the cost by less than its share `tolerance`, or after `steps`.
        """
        free = len(x) if free is None else free
        part, rest = x[:free], x[free:]

        def residuals(part: Tensor) -> Tensor:
            return self.residuals(torch.cat((part, rest)))

        def cost(part: Tensor) -> Tensor:
            far = residuals(part).square().sum(1) / OUTLIER**2
            robust = 2 * OUTLIER**2 * ((1 + far).sqrt() - 1)
            return robust.sum() + (self._precision(part) * (part - self.mean[:free]).square()).sum()

        # Forward mode costs a pass for each unknown, reverse mode one for each residual.
        derive = (torch.func.jacfwd if free < self.pixels.numel() else torch.func.jacrev)(residuals)
        damping, least, moved = 1e-3, cost(part), True
        for _ in range(steps):
            if moved:
                r, jacobian = residuals(part), derive(part)  # (K, 2), (K, 2, free)
                weights = (1 + r.square().sum(1) / OUTLIER**2).rsqrt()
                precision = self._precision(part)
                hessian = torch.einsum("k,kci,kcj->ij", weights, jacobian, jacobian) + precision.diag()
                slope = torch.einsum("k,kci,kc->i", weights, jacobian, r) + precision * (part - self.mean[:free])
            new = part - torch.linalg.solve(hessian + damping * hessian.diagonal().diag(), slope)
            new_cost = cost(new)
            moved = bool(new_cost < least)
            damping = damping / 5 if moved else damping * 8
            if moved:
                gain = least - new_cost
                part, least = new, new_cost
                if gain < tolerance * least:
                    break
        return torch.cat((part, rest))

    def _precision(self, part: Tensor) -> Tensor:
        """Of the priors, by the sign of the unknowns."""
        return torch.where(part < 0, self.negative_precision[: len(part)], self.precision[: len(part)])

    def result(self, x: Tensor, width: int, height: int) -> tuple[Cameras, HeadParameters]:
        """In float32; the camera turns about the pivot, its viewmat about the origin of the head."""
        rotation = axis_angle_to_matrix(x[:3]) @ self.rotation
        viewmat = torch.eye(4, dtype=torch.float64)
        viewmat[:3, :3], viewmat[:3, 3] = rotation, self.translation(x) - rotation @ self.pivot
        K = torch.eye(3, dtype=torch.float64)
        K[0, 0] = K[1, 1] = self.lens(x)[0]
        K[:2, 2] = self.principal
        params = self.params(x)
        return Cameras(viewmat[None], K[None], width, height).to(torch.float32), params.to(torch.float32)


@functools.lru_cache(maxsize=2)
def _landmarks_alone(head: HeadModel, count: int) -> HeadModel:
    """A small head model in float64 with the corners of the last `count` landmarks' faces and the joints as vertices.

    Of 68 landmarks, those of the jaw are followed by their rows, as landmarks as well.
    """
    head = head.to("cpu")
    faces, barycentrics = head.landmark_faces[-count:], head.landmark_barycentrics[-count:].double()
    if count == N_LANDMARKS:
        row_faces, row_barycentrics = _jaw_rows(head)
        faces, barycentrics = torch.cat((faces, row_faces)), torch.cat((barycentrics, row_barycentrics))
    used, corners = head.faces[faces].unique(return_inverse=True)
    regressor = head.joint_regressor.double()

    def chosen(per_vertex: Tensor) -> Tensor:
        per_vertex = per_vertex.double()
        return torch.cat((per_vertex[used], torch.einsum("jv,v...->j...", regressor, per_vertex)))

    every = ("template", "shape_dirs", "expression_dirs", "pose_dirs", "skinning_weights")
    joints = torch.cat((torch.zeros(head.n_joints, len(used)), torch.eye(head.n_joints)), 1).double()
    return dataclasses.replace(
        head,
        **{name: chosen(getattr(head, name)) for name in every},  # type: ignore[arg-type]
        faces=corners,
        joint_regressor=joints,
        landmark_faces=torch.arange(len(corners)),
        landmark_barycentrics=barycentrics,
        regions={},
    )


def _jaw_rows(head: HeadModel) -> tuple[Tensor, Tensor]:
    """Faces (17 R,) and barycentrics (17 R, 3) of the points from the nose to each landmark of the jaw, seen from the front."""
    vertices = head.template.double().numpy()
    marks = head.landmarks(head.template).double().numpy()
    nose = marks[27:36].mean(0)
    a, b, c = vertices[head.faces.numpy()].transpose(1, 0, 2)  # (F, 3) each
    area = (b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0]
    facing = np.flatnonzero(area > 1e-12)
    a, b, c, area = a[facing], b[facing], c[facing], area[facing]
    faces: list[int] = []
    barycentrics: list[np.ndarray] = []
    for landmark, mark in enumerate(marks[:N_JAW]):
        for along in ROW:
            p = nose + along * (mark - nose)
            wb = ((p - a)[:, 0] * (c - a)[:, 1] - (p - a)[:, 1] * (c - a)[:, 0]) / area
            wc = ((b - a)[:, 0] * (p - a)[:, 1] - (b - a)[:, 1] * (p - a)[:, 0]) / area
            weights = np.stack((1 - wb - wc, wb, wc), 1)
            depth = np.where((weights >= -1e-9).all(1), a[:, 2] * weights[:, 0] + b[:, 2] * wb + c[:, 2] * wc, -np.inf)
            front = int(depth.argmax())
            if depth[front] > -np.inf:
                faces.append(int(facing[front]))
                barycentrics.append(weights[front])
            else:  # a hole, such as between lips
                faces.append(int(head.landmark_faces[landmark]))
                barycentrics.append(head.landmark_barycentrics[landmark].double().numpy())
    return torch.from_numpy(np.array(faces)), torch.from_numpy(np.array(barycentrics))
