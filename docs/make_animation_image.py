"""Draw `docs/images/animation.png`: ground-truth avatars of synthetic subjects, 26,000 Gaussians each.

python docs/make_animation_image.py --head procedural --output docs/images/animation.png
"""

import argparse
from pathlib import Path

from PIL import Image

from gaussian_tokenizer.heads.loading import load_head
from gaussian_tokenizer.rendering.cameras import portrait_cameras
from gaussian_tokenizer.rendering.splatting import render, to_rgba
from gaussian_tokenizer.synthetic.subject import synthesize_subject
from training.recipe.report import draw_avatars


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head", default="procedural")
    parser.add_argument("--output", type=Path, default=Path("docs/images/animation.png"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 4, 6])
    parser.add_argument("--image_size", type=int, default=192)
    options = parser.parse_args()
    head = load_head(options.head)
    camera = portrait_cameras(head, options.image_size)
    rows = []
    for seed in options.seeds:
        avatar = synthesize_subject(head, (0, seed)).avatar
        image = render(avatar.canonical_gaussians(), camera, background=0.0)
        rows.append((str(seed), Image.fromarray(to_rgba(image.image[0], image.alpha[0])), avatar))
    draw_avatars(options.output, rows, options.image_size)


if __name__ == "__main__":
    main()
