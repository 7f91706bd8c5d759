"""Draw `docs/images/inspect.png`: the contact sheet of a subject whose cameras have the wrong convention.

python docs/make_inspect_image.py --output docs/images/inspect.png
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from gaussian_tokenizer.captures.frame import OPENGL_TO_OPENCV
from gaussian_tokenizer.inspect.__main__ import main as inspect
from gaussian_tokenizer.synthesize import synthesize
from gaussian_tokenizer.synthetic.source import PLAIN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head", default="procedural")
    parser.add_argument("--output", type=Path, default=Path("docs/images/inspect.png"))
    options = parser.parse_args()
    with TemporaryDirectory() as temporary:
        [subject] = synthesize(temporary, 1, options.head, seed=4, image_size=208, views=8, timesteps=4, **PLAIN)
        for path in subject.glob("transforms*.json"):
            content = json.loads(path.read_text())
            for entry in content["frames"]:
                camera_to_world = np.array(entry["transform_matrix"])
                entry["transform_matrix"] = np.linalg.inv(camera_to_world @ OPENGL_TO_OPENCV).tolist()
            path.write_text(json.dumps(content))
        inspect([str(subject), "--head", options.head, "--image", str(options.output)])


if __name__ == "__main__":
    main()
