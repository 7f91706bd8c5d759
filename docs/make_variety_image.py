"""Draw `docs/images/variety.png`: portraits of synthetic subjects; the last row is the first one with `augment_portraits`.

python docs/make_variety_image.py --head procedural:2000 --output docs/images/variety.png
"""

import argparse
from pathlib import Path

from PIL import Image

from gaussian_tokenizer.heads.loading import load_head
from gaussian_tokenizer.synthetic.source import SyntheticSettings, SyntheticSource
from gaussian_tokenizer.utils.atomic import atomic_file
from training.common.portraits import PortraitAugmentation

COLUMNS, ROWS, BACKDROP = 10, 3, (205, 207, 212, 255)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head", default="procedural:2000")
    parser.add_argument("--output", type=Path, default=Path("docs/images/variety.png"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image_size", type=int, default=92)
    options = parser.parse_args()
    head, settings = load_head(options.head), SyntheticSettings(seed=options.seed, image_size=options.image_size)
    source = SyntheticSource(COLUMNS * ROWS, settings)
    portraits = [Image.fromarray(source.open(name, head).images[0].image) for name in source.names()]
    tiles = portraits + [
        PortraitAugmentation(options.seed, index, lambda random: portraits[int(random.integers(len(portraits)))])(
            portrait
        )
        for index, portrait in enumerate(portraits[:COLUMNS])
    ]
    side = options.image_size
    sheet = Image.new("RGBA", (COLUMNS * side, (ROWS + 1) * side), BACKDROP)
    for index, tile in enumerate(tiles):
        if index >= COLUMNS * ROWS:
            tile.putalpha(255)  # its background shows, whether or not it says so
        sheet.alpha_composite(tile, (index % COLUMNS * side, index // COLUMNS * side))
    with atomic_file(options.output) as file:
        sheet.convert("RGB").save(file, format="PNG", optimize=True)


if __name__ == "__main__":
    main()
