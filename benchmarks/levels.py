"""Levels of the point model at equal time: a position of the decoder a token or a point, with or without mesh-aware faces.

    pointillist synthesize --num_subjects 320 --num_validation 16 --head procedural:2000 --num_points 2000 --identity_scale 2.5 \\
        --min_points_per_face 1 --views 1 --timesteps 1 --image_size 126 --tokenizer_image_size 126 --n_bins 256 \\
        --corpus outputs/levels/corpus
    python benchmarks/levels.py --corpus outputs/levels/corpus --minutes 20 --seeds 0 1 2

Every row has the same decoder, condition encoders, batches of windows of the same points, and optimizer; the learning rate follows
the clock. Measured on held-out subjects: nats per point and by slot, and clouds of one candidate each: chamfer distance to the own
cloud and to the others, whether the own one is nearest, the height reached (1: that of the true cloud), points, clouds that fell
apart (chamfer above three times the median), points a second. A finished run is kept in --output_dir and not repeated.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import markdown_table, write_report
from torch.utils.data import DataLoader

from gaussian_tokenizer.corpus.corpus import Corpus, load_corpus
from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer
from modeling import PointillistConfig, PointillistForCausalLM
from modeling.pipeline import SAMPLING
from training.common.rows import AvatarRows
from training.pretraining.metrics import slot_metrics, slot_sums
from training.pretraining.windows import EvaluationWindows, TrainWindows, collate_windows
from training.recipe.report import chamfer, judge

SIZE: dict[str, Any] = dict(
    hidden_size=192, intermediate_size=768, num_hidden_layers=5, num_attention_heads=6, head_dim=32, initializer_range=0.05,
    partial_rotary_factor=1.0, loss_within_slot=True, point_latents=32, point_samples=1024, point_hidden_size=96,
    point_layers=1, point_attention_heads=4, point_frequencies=4, freeze_vision_encoder=False,
    vision_config=dict(hidden_size=96, num_hidden_layers=2, num_attention_heads=3, patch_size=14),
)  # fmt: skip
ROWS: dict[str, dict[str, Any]] = {
    "token": dict(level="token"),
    "token, y z x f": dict(level="token", token_order="yzxf"),
    "point, absolute": dict(level="point"),
    "point, mesh-aware y f z x": dict(level="point", mesh_aware_faces=True, slot_order="yfzx"),
    "point, mesh-aware y f x z": dict(level="point", mesh_aware_faces=True, slot_order="yfxz"),
    "point, mesh-aware y f x z, attention head": dict(
        level="point", mesh_aware_faces=True, slot_order="yfxz", slot_head="attention"
    ),
    "point, mesh-aware f y z x": dict(level="point", mesh_aware_faces=True, slot_order="fyzx"),
    "point, mesh-aware y z x f": dict(level="point", mesh_aware_faces=True, slot_order="yzxf"),
}
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--minutes", type=float, default=20, help="of training, for each run")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall",
        help="of minutes and points a second; processor: processor time of this process, with OMP_NUM_THREADS=1 about the "
        "wall time on an idle core, so that rows can be compared on a busy machine",
    )  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--window", type=int, default=384, help="points of a training window")
    parser.add_argument("--batch", type=int, default=8, help="windows of a step")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--clouds", type=int, default=16, help="generated clouds; the held-out subjects take turns")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of matrix products in training"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/levels"))
    arguments = parser.parse_args()
    corpus = load_corpus(arguments.corpus)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in arguments.seeds:
        for name in arguments.rows:
            time_limit = f"{arguments.minutes:g} min" + " processor" * (arguments.clock == "processor")
            own = f"{name} {seed} {time_limit} {Path(arguments.corpus).name}"
            path = arguments.output_dir / f"{own.replace(' ', '_').replace(',', '')}.json"
            if not path.is_file():
                path.write_text(json.dumps(run(corpus, name, seed, arguments, path.with_suffix("")), indent=2))
            results.append(json.loads(path.read_text()))
            print(json.dumps(results[-1]), flush=True)
    print(markdown_table(results))
    settings = {key: value for key, value in vars(arguments).items() if key not in ("output_dir", "corpus", "rows")}
    print(f"written: {write_report(f'levels_{Path(arguments.corpus).name}', results, **settings)}")


def run(corpus: Corpus, name: str, seed: int, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train one row for some minutes and measure it."""
    torch.manual_seed(seed)
    own = ROWS[name]
    tokenizer = reordered(corpus.tokenizer, own.get("token_order", "xyzf"))
    grouped = own["level"] == "point"
    lower, upper = np.asarray(tokenizer.bounds)
    config = PointillistConfig(
        **SIZE | own,
        n_bins=tokenizer.n_bins,
        n_faces=tokenizer.n_faces,
        sliding_window=arguments.window * (1 if grouped else 4),
        point_center=((lower + upper) / 2).tolist(),
        point_extent=float((upper - lower).max()) / 2,
    )
    config.vision_config.image_size = tokenizer.image_size
    model = PointillistForCausalLM(config)
    train, heldout = (ReorderedRows(corpus, split, model.input_names, tokenizer) for split in ("train", "validation"))
    collate = partial(collate_windows, pad_token_id=config.pad_token_id, grouped=grouped)
    windows = TrainWindows(train, config.window_tokens, 10**9, seed, 0.05, grouped)
    steps, loss = train_for(model, DataLoader(windows, arguments.batch, collate_fn=collate), arguments)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.eval()
    evaluation = DataLoader(EvaluationWindows(heldout, config.window_tokens, 16, grouped), 8, collate_fn=collate)
    sums = torch.zeros(3, 4, dtype=torch.double)
    with torch.no_grad():
        for batch in evaluation:
            labels = batch.pop("labels")
            sums += slot_sums(model(**batch).logits, labels, config).sum(0)
    metrics = slot_metrics(sums)
    slots = {f"nats {slot}": metrics[f"nll_{slot}"] for slot in ("y", "face", "z", "x")}
    # The end is counted in the slot that comes first; a point has four tokens.
    point = {"row": name, "seed": seed, "steps": steps, "loss": loss, "nats per point": 4 * metrics["nll"], **slots}
    return point | clouds(model, heldout, arguments.clouds, seed, CLOCKS[arguments.clock])


def reordered(tokenizer: GaussianTokenizer, token_order: str) -> GaussianTokenizer:
    """The same tokenizer with another `token_order`."""
    names = ("n_bins", "n_faces", "bounds", "axis_order", "image_size", "head_name", "head_hash")
    return GaussianTokenizer(**{name: getattr(tokenizer, name) for name in names}, token_order=token_order)


class ReorderedRows(AvatarRows):
    """The rows of a corpus as if it had been built with `tokenizer`, which differs from its own in the `token_order`."""

    def __init__(self, corpus: Corpus, split: str, inputs: Iterable[str], tokenizer: GaussianTokenizer):
        super().__init__(corpus, split, inputs)
        self.tokenizer, self.own = tokenizer, corpus.tokenizer

    def sequence(self, row: int) -> np.ndarray:
        return self.tokenizer(self.own.decode(super().sequence(row)))["input_ids"].astype(np.int64)


def train_for(model: PointillistForCausalLM, loader: DataLoader, arguments: argparse.Namespace) -> tuple[int, float]:
    """AdamW until the time is over: warm-up for 3 % of it, then a cosine to zero. Steps, and mean loss of the last fifty."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=arguments.learning_rate, weight_decay=0.05, betas=(0.9, 0.95))
    clock, losses = CLOCKS[arguments.clock], []
    begin = clock()
    model.train()
    for batch in loader:
        done = (clock() - begin) / (60 * arguments.minutes)
        if done >= 1:
            break
        optimizer.param_groups[0]["lr"] = arguments.learning_rate * min(
            done / 0.03, 0.5 * (1 + math.cos(math.pi * done))
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.dtype == "bfloat16"):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) % 50 == 0:
            print(f"{done:4.0%} step {len(losses)}: loss {np.mean(losses[-50:]):.3f}", flush=True)
    return len(losses), float(np.mean(losses[-50:]))


def clouds(
    model: PointillistForCausalLM, rows: AvatarRows, count: int, seed: int, clock: Callable[[], float]
) -> dict[str, Any]:
    """Figures of `count` clouds, of one candidate each, for the subjects in turn."""
    subjects = [index % len(rows) for index in range(count)]
    items = [rows.condition(row, None) for row in subjects]
    condition = {name: torch.from_numpy(np.stack([item[name] for item in items])) for name in items[0]}
    truth = [rows.tokenizer.decode(rows.sequence(row)) for row in range(len(rows))]
    torch.manual_seed(seed)
    begin = clock()
    limit = int(1.5 * rows.lengths.max() / 4)
    ids = model.generate(
        **model.select_inputs(condition), **SAMPLING, max_points=limit, max_points_per_face=15, progress=True
    )
    seconds = clock() - begin
    own, others, nearest, heights, numbers, invalid = [], [], 0, [], [], 0
    for row, sequence in zip(subjects, ids):
        points, wrong = judge(rows.tokenizer, sequence.numpy())
        distances = np.array([chamfer(points["positions"], other["positions"]) for other in truth])
        own.append(distances[row])
        others.append(np.delete(distances, row).mean())
        nearest += int(distances.argmin() == row)
        bottom, top = truth[row]["positions"][:, 1].min(), truth[row]["positions"][:, 1].max()
        heights.append((points["positions"][:, 1].max() - bottom) / (top - bottom))
        numbers.append(len(points["faces"]) / len(truth[row]["faces"]))
        invalid += wrong
    return {
        "chamfer own mm": 1e3 * float(np.mean(own)),
        "median": 1e3 * float(np.median(own)),
        "chamfer others mm": 1e3 * float(np.mean(others)),
        "own nearest": f"{nearest} of {count}",
        "height": float(np.mean(heights)),
        "points / true": float(np.mean(numbers)),
        "apart": int((np.array(own) > 3 * np.median(own)).sum()),
        "invalid": invalid,
        "points/s": float((ids < model.config.bos_token_id).sum()) / 4 / seconds,
    }


if __name__ == "__main__":
    main()
