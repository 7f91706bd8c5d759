"""Draw docs/images/heads.png: the built-in head and, if its folder is given, ICT-FaceKit's.

    python docs/make_heads_image.py [--ict FOLDER] [--output docs/images/heads.png]

Rows are expressions (neutral, then two others), columns are views: front, three-quarter, profile, back. Colors are those of the
regions, so the image also shows what counts as scalp, brows, lips and so on.
"""

import argparse
from pathlib import Path

import numpy as np
from mesh_preview import draw_mesh
from PIL import Image

from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.heads.ict import read_ict
from gaussian_tokenizer.heads.procedural_head import build_procedural_head

VIEWS = ((0, 0), (40, 8), (90, 0), (180, 0))  # yaw, pitch in degrees
COLORS = {
    "neck": (0.84, 0.69, 0.59),
    "scalp": (0.55, 0.45, 0.40),
    "ears": (0.87, 0.68, 0.60),
    "brows": (0.42, 0.31, 0.25),
    "lips": (0.76, 0.47, 0.44),
    "mouth_interior": (0.42, 0.16, 0.15),
    "teeth": (0.93, 0.90, 0.82),
    "tongue": (0.75, 0.36, 0.36),
    "eyes": (0.96, 0.95, 0.93),
    "iris": (0.24, 0.33, 0.38),
}
# Expression weights and jaw angle (radians) of the three rows of each head.
POSES: dict[str, tuple[tuple[dict[str, float], float], ...]] = {
    "procedural": (
        ({}, 0.0),
        ({"smile_left": 1, "smile_right": 1, "lips_part": 0.6, "brows_up_left": 0.4, "brows_up_right": 0.4}, 0.05),
        ({"lids_close_left": 1, "pucker": 0.5, "brows_inner_up": 1}, 0.25),
    ),
    "ict": (
        ({}, 0.0),
        ({"mouthSmile_L": 1, "mouthSmile_R": 1, "browInnerUp_L": 0.5, "browInnerUp_R": 0.5}, 0.05),
        ({"eyeBlink_L": 1, "mouthPucker": 0.5, "browDown_R": 0.8}, 0.25),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ict", type=Path, help="an ICT-FaceKit folder; without it only the built-in head is drawn")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "images" / "heads.png")
    parser.add_argument("--image_size", type=int, default=210, help="side of one view in pixels")
    arguments = parser.parse_args()
    blocks = [draw_head(build_procedural_head(), POSES["procedural"], arguments.image_size)]
    if arguments.ict:
        blocks.append(draw_head(read_ict(arguments.ict), POSES["ict"], arguments.image_size))
    image = Image.fromarray(np.concatenate(blocks, axis=1))
    image.quantize(128, method=Image.Quantize.MEDIANCUT).save(arguments.output, optimize=True)
    print(f"{arguments.output}: {image.width} x {image.height}, {arguments.output.stat().st_size} bytes")


def draw_head(head: HeadModel, poses: tuple[tuple[dict[str, float], float], ...], size: int) -> np.ndarray:
    """(rows * size, views * size, 3) uint8."""
    colors = np.tile((0.88, 0.72, 0.62), (head.n_vertices, 1))
    for region, color in COLORS.items():
        if region in head.regions:
            colors[head.regions[region].numpy()] = color
    rows = []
    for weights, jaw_angle in poses:
        params = HeadParameters.zeros(head.n_shape, head.n_expression)
        for name, weight in weights.items():
            params.expr[0, head.expression_names.index(name)] = weight
        params.jaw_pose[0, 0] = jaw_angle
        vertices = head.pose(params).vertices[0].numpy()
        views = [
            draw_mesh(vertices, head.faces.numpy(), yaw, pitch, size, colors, center=(0, -0.028, 0), extent=0.34)
            for yaw, pitch in VIEWS
        ]
        rows.append(np.concatenate(views, axis=1))
    return np.concatenate(rows, axis=0)


if __name__ == "__main__":
    main()
