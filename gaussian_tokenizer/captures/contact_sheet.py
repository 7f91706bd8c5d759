"""The contact sheet of a tracking: a few of its images, and below the head projected over them by its cameras.

If the cameras see too little of it, a third row shows the convention that fits best. And the image of a fit to landmarks.
"""

from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gaussian_tokenizer.captures.checks import ENOUGH_SEEN, best_convention
from gaussian_tokenizer.captures.frame import Frame, load_image
from gaussian_tokenizer.captures.projection import (
    EXPECTED,
    Sample,
    as_if,
    project,
    sample_frames,
    share_seen,
    silhouette,
    size_within,
    visible_triangles,
)
from gaussian_tokenizer.captures.tracking import Tracking
from gaussian_tokenizer.heads.head_model import HeadModel

TILE, GAP, LINE = 208, 6, 18  # pixels: longest side of an image, between images, height of a line of text
GRAY, INK, BAD = (200, 200, 204), (30, 30, 34), (200, 30, 30)
MESH, OUTLINE = np.array((64, 150, 255)), (255, 214, 0)
SOLID = 0.55  # opacity of the mesh over the image
FIT, DOT = 768, 2  # pixels: longest side of the image of a fit, radius of its landmarks
MARGIN = 0.15  # around the head, in units of its size
GIVEN, FOUND = (0, 200, 70), (230, 30, 30)


def contact_sheet(tracking: Tracking, head: HeadModel, count: int = 6) -> Image.Image:
    """RGB image of up to `count` frames of a tracking, which must have frames."""
    samples = sample_frames(tracking, head, count)
    faces = head.faces.cpu().numpy()
    best, seen = best_convention(samples)
    conventions = [EXPECTED] + ([best] if seen[EXPECTED] < ENOUGH_SEEN <= seen[best] else [])
    images = [_image(tracking, each) for each in samples]
    captions = [f"timestep {each.frame.timestep}, camera {each.frame.camera}" for each in samples]
    rows = [(f"{tracking.path.name}: images", INK, [_with_text(*each) for each in zip(images, captions)])]
    for number, convention in enumerate(conventions):
        tiles = []
        for image, sample in zip(images, samples):
            viewmat = as_if(sample.frame, convention)
            share = share_seen(sample.vertices, sample.frame, viewmat)
            tile = _draw_head(image, sample, faces, viewmat, TILE)
            tiles.append(_with_text(tile, f"{share:.0%} of the head inside", INK if share >= ENOUGH_SEEN else BAD))
        title = "head as the files say" if number == 0 else f"head, were transform_matrix {convention}"
        rows.append((title, BAD if number == 0 and seen[EXPECTED] < ENOUGH_SEEN else INK, tiles))
    return _stack(rows)


def _image(tracking: Tracking, sample: Sample) -> Image.Image:
    """RGB, its longer side TILE pixels, transparent parts in gray."""
    width, height, _ = size_within(sample.frame, TILE)
    rgba = Image.fromarray((tracking.image(sample.frame_index).numpy() * 255 + 0.5).astype(np.uint8))
    backdrop = Image.new("RGBA", rgba.size, (*GRAY, 255))
    return Image.alpha_composite(backdrop, rgba).convert("RGB").resize((width, height), Image.Resampling.LANCZOS)


def draw_fit(frame: Frame, head: HeadModel, given: np.ndarray, found: np.ndarray) -> Image.Image:
    """RGB: the `given` landmarks (K, 2) in pixels, and beside them the head over the image with those that were `found`."""
    corner, frame = _around_head(frame, _posed(frame, head))
    image, mesh = _on_gray(frame, FIT), draw_head(frame, head)
    width, height, scale = size_within(frame, FIT)
    both = Image.new("RGB", (2 * width + GAP, height), "white")
    for left, panel, points, color in ((0, image, given, GIVEN), (width + GAP, mesh, found, FOUND)):
        draw = ImageDraw.Draw(panel)
        for x, y in (np.asarray(points) - corner) * scale - 0.5:
            draw.ellipse((x - DOT, y - DOT, x + DOT, y + DOT), fill=color)
        both.paste(panel, (left, 0))
    return both


def draw_head(frame: Frame, head: HeadModel, longest: int = FIT) -> Image.Image:
    """RGB, its longer side of `longest` pixels: the head over the whole image of a frame."""
    sample = Sample(0, frame, _posed(frame, head))
    return _draw_head(_on_gray(frame, longest), sample, head.faces.cpu().numpy(), frame.viewmat, longest)


def _posed(frame: Frame, head: HeadModel) -> np.ndarray:
    """Vertices (V, 3) float64 of the head in a frame."""
    return head.pose(frame.load_params().to(head.device)).vertices[0].double().cpu().numpy()


def _on_gray(frame: Frame, longest: int) -> Image.Image:
    """The image of a frame, RGB, its longer side of `longest` pixels, transparent parts in gray."""
    width, height, _ = size_within(frame, longest)
    rgba = load_image(frame.image).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", rgba.size, (*GRAY, 255)), rgba).convert("RGB")
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _around_head(frame: Frame, vertices: np.ndarray) -> tuple[np.ndarray, Frame]:
    """The part of a frame that shows the head, with a margin, as a frame of its own; and its upper left corner (2,)."""
    pixels, _ = project(vertices, frame, frame.viewmat)
    margin = MARGIN * np.ptp(pixels, axis=0)
    size = np.array([frame.width, frame.height])
    low = np.clip(np.floor(pixels.min(0) - margin), 0, size - 1).astype(int)
    high = np.clip(np.ceil(pixels.max(0) + margin), low + 1, size).astype(int)
    image = load_image(frame.image).crop((*low.tolist(), *high.tolist()))
    cx, cy = frame.cx - low[0], frame.cy - low[1]
    return low, replace(frame, image=image, mask=None, cx=cx, cy=cy, width=image.width, height=image.height)


def _draw_head(image: Image.Image, sample: Sample, faces: np.ndarray, viewmat: np.ndarray, longest: int) -> Image.Image:
    """The front faces over an image `longest` pixels long, shaded by a light at the camera, and the outline of the head."""
    frame = sample.frame
    width, height, scale = size_within(frame, longest)
    pixels, depth = project(sample.vertices, frame, viewmat)
    eye = np.linalg.inv(viewmat)[:3, 3]
    corners = sample.vertices[faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    towards = eye - corners.mean(1)
    facing = np.einsum("fi,fi->f", normals, towards)
    facing /= np.maximum(np.linalg.norm(normals, axis=1) * np.linalg.norm(towards, axis=1), 1e-20)
    # Painter's algorithm: the farthest first.
    order = np.flatnonzero(facing > 0)
    order = order[np.argsort(-depth[faces[order]].mean(1))]
    mesh = image.copy()
    draw_mesh = ImageDraw.Draw(mesh)
    shown, triangles = visible_triangles(pixels * scale, depth, faces[order], width, height)
    colors = (MESH * (0.35 + 0.65 * facing[order[shown], None])).astype(int).tolist()
    for triangle, color in zip(triangles, colors):
        draw_mesh.polygon(triangle, fill=tuple(color))
    tile = np.asarray(Image.blend(image, mesh, SOLID)).copy()
    inside = silhouette(sample.vertices, faces, frame, viewmat, longest)
    tile[inside & ~_eroded(inside)] = OUTLINE
    return Image.fromarray(tile)


def _eroded(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    return padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:] & mask


def _with_text(image: Image.Image, text: str, color: tuple[int, int, int] = INK) -> Image.Image:
    tile = Image.new("RGB", (TILE, image.height + LINE), "white")
    tile.paste(image, ((TILE - image.width) // 2, 0))
    ImageDraw.Draw(tile).text((TILE / 2, image.height + 2), text, color, ImageFont.load_default(12), anchor="ma")
    return tile


def _stack(rows: list[tuple[str, tuple[int, int, int], list[Image.Image]]]) -> Image.Image:
    width = max(len(tiles) for _, _, tiles in rows) * (TILE + GAP) + GAP
    heights = [LINE + GAP + max(tile.height for tile in tiles) + GAP for _, _, tiles in rows]
    sheet = Image.new("RGB", (width, sum(heights)), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for (title, color, tiles), height in zip(rows, heights):
        draw.text((GAP, top + GAP // 2), title, color, ImageFont.load_default(14))
        for column, tile in enumerate(tiles):
            sheet.paste(tile, (GAP + column * (TILE + GAP), top + LINE + GAP))
        top += height
    return sheet
