"""Draw `docs/images/subjects.png`: portraits of synthetic subjects, each above its point cloud.

python docs/make_subjects_image.py --head procedural --output docs/images/subjects.png
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gaussian_tokenizer.heads.loading import load_head
from gaussian_tokenizer.rendering.cameras import portrait_cameras
from gaussian_tokenizer.rendering.splatting import render
from gaussian_tokenizer.synthetic.source import PIXELS_BETWEEN_POINTS
from gaussian_tokenizer.synthetic.subject import portrait_avatar, synthesize_subject
from gaussian_tokenizer.utils.atomic import atomic_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head", default="procedural")
    parser.add_argument("--output", type=Path, default=Path("docs/images/subjects.png"))
    parser.add_argument("--num_subjects", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image_size", type=int, default=192)
    options = parser.parse_args()
    head = load_head(options.head)
    cameras = portrait_cameras(head, options.image_size, azimuths=[0.0, 25.0])
    focal = float(cameras.Ks[0, 0, 0])
    columns = []
    for index in range(options.num_subjects):
        subject = synthesize_subject(head, (options.seed, index))
        portrait = portrait_avatar(subject, spacing=PIXELS_BETWEEN_POINTS / focal).canonical_gaussians()
        points = subject.avatar.canonical_gaussians()
        # Dots are one pixel wide for many points, wider for few.
        radius = 0.5 / focal * max(1.0, (6000 / len(points)) ** 0.5)
        dots = replace(points, scales=torch.full_like(points.scales, radius))
        images = render(portrait, cameras[0]).image[0], render(dots, cameras[1]).image[0]
        columns.append((torch.cat(images).clamp(0, 1) * 255 + 0.5).byte().numpy())
    with atomic_file(options.output) as file:
        Image.fromarray(np.concatenate(columns, 1)).save(file, format="PNG", optimize=True)


if __name__ == "__main__":
    main()
