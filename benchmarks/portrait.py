"""How well `fit_portrait` finds made-up people again from their landmarks, with a normal error of one pixel in x and y.

    python benchmarks/portrait.py                  # on a CPU, one minute; one thread
    python benchmarks/portrait.py --head ict.safetensors --subjects 6

Images of 512 pixels, heads about 290 pixels high, three expressions at 0.3 to 1, cameras 0.7 to 1.6 meters away (unknown to the
fit) and up to 10 degrees above or below. Vertices are compared at rest, after the best similarity, skin of the face and whole
head; beside them the error of the mean head. Medians over the subjects.
"""

import argparse
import time

import numpy as np
import torch
from report import markdown_table, write_report

from gaussian_tokenizer.captures.portrait import fit_portrait
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.heads.loading import load_head
from gaussian_tokenizer.rendering.cameras import Cameras

SIZE, NOISE = 512, 1.0
YAWS, SCALES = (0, 15, 35), (1.0, 2.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", default="procedural:2000")
    parser.add_argument("--subjects", type=int, default=16, help="of each row")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    head = load_head(arguments.head)
    rows = []
    for scale in SCALES:
        for yaw in YAWS:
            results = [measure(head, seed, scale, yaw if seed % 2 else -yaw) for seed in range(arguments.subjects)]
            medians = {name: float(np.median([each[name] for each in results])) for name in results[0]}
            rows.append({"identity scale": scale, "yaw": yaw} | medians)
    print(markdown_table(rows))
    name = "portrait" if arguments.head == "procedural:2000" else f"portrait_{head.name.replace(':', '_')}"
    print(f"\nwritten: {write_report(name, rows, head=head.name, subjects=arguments.subjects)}")


def measure(head: HeadModel, seed: int, scale: float, yaw: float) -> dict[str, float]:
    """The errors of one subject, `yaw` degrees from the front."""
    rng = np.random.default_rng(seed)
    params = HeadParameters.zeros(head.n_shape, head.n_expression)
    params.shape.copy_(torch.from_numpy(scale * np.clip(rng.standard_normal(head.n_shape), -2.5, 2.5)))
    chosen = rng.choice(head.n_expression, 3, replace=False)
    params.expr[0, chosen] = torch.from_numpy(rng.uniform(0.3, 1, 3)).float()
    distance = float(rng.uniform(0.7, 1.6))
    camera = Cameras.orbit((0.0, 0.02, 0.0), distance, [yaw], float(rng.uniform(-10, 10)), 1300 * distance, SIZE, SIZE)
    viewmat, K = camera.viewmats[0].numpy(), camera.Ks[0].numpy()
    marks = head.landmarks(head.pose(params).vertices[0]).numpy()
    seen = (marks @ viewmat[:3, :3].T + viewmat[:3, 3]) @ K.T
    start = time.perf_counter()
    found = fit_portrait(seen[:, :2] / seen[:, 2:] + NOISE * rng.standard_normal((len(marks), 2)), head, (SIZE, SIZE))
    seconds = time.perf_counter() - start
    skin = head.regions["face"].numpy()
    truth, own = (head.canonical_vertices(each).double().numpy() for each in (params, found.params))
    turn = found.camera.viewmats[0, :3, :3].numpy() @ viewmat[:3, :3].T
    focal = float(found.camera.Ks[0, 0, 0] / camera.Ks[0, 0, 0])
    return {
        "face mm": median_distance(own[skin], truth[skin]),
        "head mm": median_distance(own, truth),
        "mean head, face mm": median_distance(head.template.double().numpy()[skin], truth[skin]),
        "landmarks rms px": found.rms,
        "turn error degrees": float(np.degrees(np.arccos(np.clip((np.trace(turn) - 1) / 2, -1, 1)))),
        "focal error %": 100 * abs(focal - 1),
        "seconds": seconds,
    }


def median_distance(points: np.ndarray, target: np.ndarray) -> float:
    """Millimeters between points (N, 3) in meters after the best similarity (Umeyama 1991)."""
    a, b = points - points.mean(0), target - target.mean(0)
    left, values, right = np.linalg.svd(b.T @ a)
    signs = np.array((1, 1, np.sign(np.linalg.det(left @ right))))
    aligned = (values * signs).sum() / np.square(a).sum() * a @ (left * signs @ right).T
    return 1000 * float(np.median(np.linalg.norm(aligned - b, axis=1)))


if __name__ == "__main__":
    main()
