"""Draw `docs/images/subjects.png`: portraits of synthetic subjects, under each its point cloud.

python docs/make_subjects_picture.py --head procedural --output docs/images/subjects.png
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gaussian_tokenizer.atomic import atomic_file
from gaussian_tokenizer.head_model import load_head
from gaussian_tokenizer.portrait import splat, to_uint8
from gaussian_tokenizer.synthesize import render_frames
from gaussian_tokenizer.synthetic import portrait_camera, synthesize_subject


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head", default="procedural")
    parser.add_argument("--output", type=Path, default=Path("docs/images/subjects.png"))
    parser.add_argument("--num_subjects", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image_size", type=int, default=192)
    options = parser.parse_args()
    head = load_head(options.head)
    camera = portrait_camera(head, options.image_size, azimuth=25)
    columns = []
    for index in range(options.num_subjects):
        subject = synthesize_subject(head, (options.seed, index))
        portrait = render_frames(subject, options.image_size, views=1)[0].image
        gaussians = subject.avatar.posed_gaussians()
        # Dots: one pixel wide where there are many points, wider where there are few.
        radius = 0.5 / camera.K[0, 0] * max(1.0, (6000 / len(subject.avatar)) ** 0.5)
        dots = gaussians | {"scales": torch.full_like(gaussians["scales"], radius)}
        columns.append(np.concatenate((portrait, to_uint8(splat(dots, camera)[0]))))
    with atomic_file(options.output) as file:
        Image.fromarray(np.concatenate(columns, 1)).save(file, format="PNG", optimize=True)


if __name__ == "__main__":
    main()
