"""Images of point clouds (N, 3), y up, the face towards +z: three views, colored by the order of generation; and one view, fast."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

VIEWS = {"front": 0.0, "three-quarter": 45.0, "profile": 90.0}
RAMP = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)])  # as matplotlib's viridis
DOTS = (500, 4_000)  # points from which they are drawn a pixel smaller each time


def view(positions: np.ndarray, azimuth: float) -> tuple[np.ndarray, np.ndarray]:
    """Turn a cloud (N, 3) by `azimuth` degrees about y: image coordinates (N, 2) in meters and depth (N,), large is near."""
    angle = np.radians(azimuth)
    x, y, z = np.asarray(positions, np.float64).T
    return np.stack((x * np.cos(angle) - z * np.sin(angle), y), axis=1), x * np.sin(angle) + z * np.cos(angle)


def draw_cloud(axes, positions: np.ndarray, azimuth: float) -> None:
    """Scatter one view on matplotlib axes, near points over far ones, early points dark and late ones bright."""
    order = np.linspace(0, 1, len(positions))
    image, depth = view(positions, azimuth)
    near_last = np.argsort(depth)
    size = min(9.0, 2500 / max(len(positions), 1))
    style = dict(cmap="viridis", vmin=0, vmax=1, s=size, linewidths=0, rasterized=True)
    axes.scatter(*image[near_last].T, c=order[near_last], **style)
    axes.set_aspect("equal")
    axes.axis("off")


def draw_comparison(
    path: str | Path,
    rows: Sequence[tuple[str, Image.Image | None, dict[str, np.ndarray]]],
    azimuths: dict[str, float] = VIEWS,
) -> None:
    """A PNG with one row a subject: its portrait, then each of its named clouds in each view, all at one scale.

    `rows` are (label, portrait or None, {name: positions (N, 3)}), the names the same in all; `azimuths` in degrees.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('images of point clouds need matplotlib: pip install "avatar-pointillist[demo]"') from None
    clouds = [cloud for _, _, named in rows for cloud in named.values() if len(cloud)]
    everything = np.concatenate(clouds) if clouds else np.zeros((1, 3))
    reach = 1.05 * max(float(np.abs(everything[:, [0, 2]]).max()), 1e-3)
    middle = (everything[:, 1].max() + everything[:, 1].min()) / 2
    half = max(1.05 * np.ptp(everything[:, 1]) / 2, reach)
    columns = 1 + len(rows[0][2]) * len(azimuths)
    figure = Figure(figsize=(1.5 * columns, 1.5 * half / reach * len(rows) + 0.4), dpi=110, layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for line, (label, portrait, named) in zip(grid, rows):
        if portrait is not None:
            line[0].imshow(portrait.convert("RGBA"))  # gray and palette images too
        line[0].axis("off")
        line[0].set_title(label, fontsize=7)
        for i, (name, positions) in enumerate(named.items()):
            for j, (view_name, azimuth) in enumerate(azimuths.items()):
                axes = line[1 + i * len(azimuths) + j]
                draw_cloud(axes, positions, azimuth)
                axes.set(xlim=(-reach, reach), ylim=(middle - half, middle + half))
                axes.set_title(f"{name}, {len(positions):,} points" if j == 0 else view_name, fontsize=7)
    figure.savefig(path)


def draw_points(positions: np.ndarray, vertices: np.ndarray, azimuth: float, size: int) -> Image.Image:
    """RGB, `size` pixels square, in milliseconds: a cloud (N, 3), dark below and bright above, over its head (V, 3) in gray.

    The head fills the image from every side, so a cloud that grows stays where it is.
    """
    low, high = vertices.min(0), vertices.max(0)
    reach = max(high[1] - low[1], float(np.hypot(*(high - low)[[0, 2]])))
    share = np.clip((positions[:, 1] - low[1]) / (high[1] - low[1]), 0, 1)
    colors = np.stack([np.interp(share, np.linspace(0, 1, len(RAMP)), each) for each in RAMP.T], 1)
    dot = 4 - int(np.searchsorted(DOTS, len(positions), "right"))
    canvas = np.full((size + 4, size + 4, 3), 255, np.uint8)
    for points, color, side in ((vertices, np.full((len(vertices), 3), 205), 2), (positions, colors, dot)):
        image, depth = view(points - (low + high) / 2, azimuth)
        near_last = np.argsort(depth)
        x, y = np.clip((image[near_last] * (1, -1) * 0.95 / reach + 0.5) * size, 0, size).astype(int).T
        for dx, dy in np.ndindex(side, side):
            canvas[y + dy, x + dx] = color[near_last]
    return Image.fromarray(canvas[:size, :size])
