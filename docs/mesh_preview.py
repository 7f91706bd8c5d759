"""Images of meshes for the documentation: a small z-buffer rasterizer in NumPy.

Orthographic, a key light and a fill light, smooth shading from vertex normals, optional vertex colors. It draws meshes, not
Gaussians, and has no cameras: a view is a rotation about the vertical axis and a tilt.
"""

import numpy as np

SKIN = (0.86, 0.72, 0.62)
LIGHTS = (((0.35, 0.55, 0.75), 0.75), ((-0.8, 0.1, 0.4), 0.22))  # direction towards the light, strength
AMBIENT = 0.16


def draw_mesh(
    vertices: np.ndarray,
    faces: np.ndarray,
    yaw: float = 0.0,
    pitch: float = 0.0,
    size: int = 256,
    colors: np.ndarray | None = None,
    center: np.ndarray | None = None,
    extent: float | None = None,
    background: float = 1.0,
) -> np.ndarray:
    """vertices (V, 3), faces (F, 3), colors (V, 3) in 0..1 or None -> (size, size, 3) uint8.

    `yaw` in degrees: 0 looks at the face (+z), 90 at the subject's left side (+x), 180 at the back; `pitch` > 0 looks
    from above. `center` (3,) and `extent` (the side of the square, in the unit of the vertices) default to a frame
    around the mesh.
    """
    vertices = np.asarray(vertices, np.float64)
    faces = np.asarray(faces, np.int64)
    colors = np.broadcast_to(SKIN if colors is None else colors, vertices.shape)
    center = (vertices.min(0) + vertices.max(0)) / 2 if center is None else np.asarray(center)
    extent = 1.1 * float((vertices.max(0) - vertices.min(0)).max()) if extent is None else extent

    rotation = _view_rotation(yaw, pitch)
    shade = _shade(_vertex_normals(vertices, faces) @ rotation.T)
    seen = (vertices - center) @ rotation.T
    scale = 2 * size / extent  # drawn at twice the size, then averaged: smooth outlines
    pixels = np.stack((size + scale * seen[:, 0], size - scale * seen[:, 1], seen[:, 2]), 1)
    image = _rasterize(pixels, faces, colors * shade[:, None], 2 * size, background)
    image = image.reshape(size, 2, size, 2, 3).mean((1, 3))
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _view_rotation(yaw: float, pitch: float) -> np.ndarray:
    a, b = np.deg2rad(yaw), np.deg2rad(pitch)
    turn = np.array([[np.cos(a), 0, -np.sin(a)], [0, 1, 0], [np.sin(a), 0, np.cos(a)]])
    tilt = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    return tilt @ turn


def _vertex_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    a, b, c = vertices[faces].transpose(1, 0, 2)
    normals = np.zeros_like(vertices)
    for corner in range(3):
        np.add.at(normals, faces[:, corner], np.cross(b - a, c - a))
    return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-20)


def _shade(normals: np.ndarray) -> np.ndarray:
    """(V, 3) normals in the viewer's frame -> (V,) brightness: Lambert's law."""
    brightness = np.full(len(normals), AMBIENT)
    for direction, strength in LIGHTS:
        brightness += strength * np.clip(normals @ (np.array(direction) / np.linalg.norm(direction)), 0, None)
    return brightness


def _rasterize(pixels: np.ndarray, faces: np.ndarray, colors: np.ndarray, size: int, background: float) -> np.ndarray:
    """Nearest front-facing triangle at every pixel center, colors interpolated; (size, size, 3)."""
    image = np.full((size, size, 3), background)
    depth = np.full((size, size), -np.inf)
    for face in faces:
        (ax, ay, az), (bx, by, bz), (cx, cy, cz) = pixels[face]
        area = (bx - ax) * (cy - ay) - (cx - ax) * (by - ay)
        if area >= 0:  # image y points down, so a counter-clockwise face has negative area
            continue
        x0, x1 = max(int(np.ceil(min(ax, bx, cx) - 0.5)), 0), min(int(max(ax, bx, cx) + 0.5), size)
        y0, y1 = max(int(np.ceil(min(ay, by, cy) - 0.5)), 0), min(int(max(ay, by, cy) + 0.5), size)
        if x0 >= x1 or y0 >= y1:
            continue
        x, y = np.arange(x0, x1) + 0.5, np.arange(y0, y1)[:, None] + 0.5
        wb = ((x - ax) * (cy - ay) - (cx - ax) * (y - ay)) / area
        wc = ((bx - ax) * (y - ay) - (x - ax) * (by - ay)) / area
        wa = 1 - wb - wc
        z = wa * az + wb * bz + wc * cz
        tile = depth[y0:y1, x0:x1]
        seen = (wa >= 0) & (wb >= 0) & (wc >= 0) & (z > tile)
        tile[seen] = z[seen]
        weights = np.stack((wa, wb, wc), -1)[seen]
        image[y0:y1, x0:x1][seen] = weights @ colors[face]
    return image
