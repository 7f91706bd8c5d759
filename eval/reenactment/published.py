"""Published numbers, for orientation: other data, other code, other definitions. Never mixed with measured ones.

From the AvatarPointillist paper (CVPR 2026): Table S1, on VFHQ, and the table on NeRSemble with the ablations. The paper does not
define AKD, APD, CLIP and FID, and no code was released.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedTable:
    """A table of the paper: a row of numbers for each method, None where it has none."""

    title: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[float | None, ...]]


TABLES = (
    PublishedTable(
        "VFHQ (Table S1 of the paper)",
        ("self LPIPS", "self FID", "self AKD", "self APD", "cross FID", "cross CLIP", "cross AKD", "cross APD"),
        {
            "Portrait4Dv2": (0.29, 66.60, 4.74, 5.08, 78.92, 0.67, 10.84, 6.13),
            "AvatarArtist": (0.26, 52.26, 4.28, 11.72, 71.83, 0.43, 9.69, 8.93),
            "LAM": (0.34, 89.32, 9.67, 20.45, 100.54, 0.21, 18.28, 13.10),
            "GAGAvatar": (0.24, 47.93, 3.98, 9.64, 70.29, 0.52, 10.26, 7.89),
            "AvatarPointillist": (0.22, 50.24, 3.21, 4.24, 65.84, 0.57, 9.38, 5.26),
        },
    ),
    PublishedTable(
        "NeRSemble (the paper's main table and its ablations)",
        ("self LPIPS", "self FID", "self AKD", "self APD", "cross FID", "cross CLIP"),
        {
            "Portrait4Dv2": (0.20, 123.02, 5.32, 34.53, 191.13, 0.63),
            "AvatarArtist": (0.21, 118.94, 6.87, 39.58, 175.69, 0.61),
            "LAM": (0.24, 136.01, 4.37, 61.83, 238.54, 0.54),
            "GAGAvatar": (0.18, 111.76, 3.93, 27.94, 181.22, 0.71),
            "AvatarPointillist": (0.15, 95.18, 2.38, 22.86, 160.74, 0.75),
            "ablation: FLAME position": (0.23, 120.34, 4.82, 41.22, None, None),
            "ablation: AR feature only": (0.22, 110.93, 5.89, 32.96, None, None),
            "ablation: AR position only": (0.19, 103.80, 5.81, 41.49, None, None),
        },
    ),
)
