"""The point model in float32, bfloat16 and with 8-bit weights: training steps, decoding, and what rounding costs.

    python benchmarks/precision.py                  # training, on a CPU, two or three minutes; one thread
    python benchmarks/precision.py --head_dim 64
    python benchmarks/precision.py --parts decoding # four layers of the paper's size; 8-bit weights by torchao
    python benchmarks/precision.py --parts nll --model outputs/point --corpus outputs/levels/corpus

Training: float32 and bfloat16 (autocast), with and without a mask in self-attention. Each row trains its own copy of one model on
the same windows. The rows take turns; each counts its best round. On a machine with other work, ratios mean more than speeds: the
load average before and after is recorded. The data is a random walk over the coordinates, whose next token is one of four, so a
model that has learned it is at 1.39 nats.

Decoding: milliseconds a point from bos on, of one cloud and of four, and MiB of the checkpoint. On a CPU processor time. NLL: nats
per point of held-out subjects by a trained model. The decoder's linear layers are in 8 bits; embeddings, norms and heads are not.
"""

import argparse
import copy
import math
import os
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from ar_model import Clock
from report import markdown_table, write_report
from torch.nn.functional import normalize
from torch.utils.data import DataLoader

from gaussian_tokenizer.corpus.corpus import load_corpus
from gaussian_tokenizer.utils.precision import supports_bf16
from modeling import PointillistConfig, PointillistForCausalLM
from modeling.generate import compiled_steps, quantization
from training.common.rows import AvatarRows
from training.pretraining.metrics import slot_metrics, slot_sums
from training.pretraining.windows import EvaluationWindows, collate_windows

CONDITION_TOKENS = 65
POINTS = 8  # decoded points that are timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["training", "decoding", "nll"], default=["training"])
    parser.add_argument("--window", type=int, default=1024, help="tokens in a window")
    parser.add_argument("--windows", type=int, default=4, help="in a step")
    parser.add_argument("--head_dim", type=int, default=32, help="channels of a head")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of decoding and NLL")
    parser.add_argument("--compiled", action="store_true", help="also decode by compiled steps")
    parser.add_argument("--model", help="a trained point model, for the NLL")
    parser.add_argument("--corpus", help="for the NLL")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    for part in arguments.parts:
        {"training": training, "decoding": decoding, "nll": nll}[part](arguments)


def training(arguments: argparse.Namespace) -> None:
    size = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=5, head_dim=arguments.head_dim)
    config = PointillistConfig(
        **size, num_attention_heads=256 // arguments.head_dim, n_bins=256, n_faces=2000,
        sliding_window=arguments.window, use_vision_encoder=False, use_point_encoder=False,
    )  # fmt: skip
    model = PointillistForCausalLM(config).train()
    ids = torch.randint(0, 4, (arguments.windows, arguments.window)).cumsum(1) % config.n_bins
    condition = torch.randn(arguments.windows, CONDITION_TOKENS, config.hidden_size)
    mask = torch.ones(arguments.window, arguments.window, dtype=torch.bool).tril().expand(len(ids), 1, -1, -1)
    cases = {
        (name, masked): Case(model, bf16, {"attention_mask": mask} if masked else {})
        for name, bf16 in (("float32", False), ("bfloat16", True))
        for masked in (True, False)
    }
    loads = [os.getloadavg()[0]]
    for turn in range(arguments.rounds + 1):
        for case in cases.values():
            case.step(ids, condition, timed=turn > 0)
        print(f"round {turn} of {arguments.rounds}" + (" (warm-up)" if not turn else ""), flush=True)
    loads.append(os.getloadavg()[0])
    slowest = sum(cases["float32", True].best)
    rows = [
        {
            "precision": name,
            "mask": "given" if masked else "none needed",
            "tokens/s": ids.numel() / sum(case.best),
            "forward s": case.best[0],
            "backward s": case.best[1],
            "x first row": slowest / sum(case.best),
            f"loss after {arguments.rounds + 1} steps": case.loss,
        }
        for (name, masked), case in cases.items()
    ]
    print(markdown_table(rows))
    path = write_report(
        "precision" if arguments.head_dim == 32 else f"precision_head_dim_{arguments.head_dim}",
        rows,
        size=size | {"windows": arguments.windows, "window": arguments.window},
        parameters=model.num_decoder_parameters(),
        threads=arguments.threads,
        supports_bf16=supports_bf16("cpu"),
        load_average_before_and_after=loads,
    )
    print(f"\nload average {loads[0]:.1f} before and {loads[1]:.1f} after; written: {path}")


def precisions(device: str) -> dict[str, dict[str, Any]]:
    """Options of `from_pretrained` for each row."""
    from torchao.quantization import Float8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    rows: dict[str, dict[str, Any]] = {dtype: {"dtype": dtype} for dtype in ("float32", "bfloat16")}
    for name, chosen in {
        "int8 weights and activations": Int8DynamicActivationInt8WeightConfig(),
        "int8 weights": Int8WeightOnlyConfig(),
        "float8 weights": Float8WeightOnlyConfig(),
    }.items():
        own = quantization(device)
        own.quant_type = chosen
        rows |= {f"{name}, {dtype}": {"dtype": dtype, "quantization_config": own} for dtype in ("float32", "bfloat16")}
    return rows


@torch.no_grad()
def decoding(arguments: argparse.Namespace) -> None:
    size = dict(num_hidden_layers=4, use_vision_encoder=False, use_point_encoder=False)
    rows = []
    for level in ("token", "point"):
        config = PointillistConfig(**size, level=level, mesh_aware_faces=level == "point")
        condition = {
            "condition_embeds": torch.randn(1, 513, config.hidden_size),
            "face_centers": config.n_bins * torch.rand(1, config.n_faces, 3),
            "face_normals": normalize(torch.randn(1, config.n_faces, 3), dim=-1),
        }
        with TemporaryDirectory() as folder:
            PointillistForCausalLM(config).save_pretrained(folder)
            for name, options in precisions(arguments.device).items():
                if name.startswith("float8") and arguments.device == "cpu":
                    continue  # unpacked in every step: twenty times as long
                model = PointillistForCausalLM.from_pretrained(folder, **options).eval().to(arguments.device)
                given = {key: value.to(arguments.device, model.dtype) for key, value in condition.items()}
                row: dict[str, Any] = {"level": level, "precision": name, "MiB": saved_size(model)}
                for clouds in (1, 4):
                    row[f"ms a point, {clouds} at once"] = milliseconds(model, given, clouds, arguments.rounds, {})
                if arguments.compiled:
                    row["compiled"] = milliseconds(model, given, 1, arguments.rounds, compiled_steps())
                rows.append(row)
                print(row, flush=True)
    print(markdown_table(rows))
    compiled = "_compiled" if arguments.compiled else ""
    print(f"written: {write_report(f'precision_decoding{compiled}', rows, size=size, threads=arguments.threads)}")


def saved_size(model: PointillistForCausalLM) -> float:
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")) / 2**20


def milliseconds(model: PointillistForCausalLM, given: dict, clouds: int, rounds: int, options: dict) -> float:
    """The least milliseconds in which each of `clouds` gets a point."""
    clock = Clock(model.device, by_cpu=model.device.type == "cpu")
    points = 2 + POINTS
    for _ in range(max(1, rounds // 3)):
        ticks, clock.ticks = clock.ticks, []
        model.generate(
            torch.full((clouds, 1), model.config.bos_token_id, device=model.device),
            **given | options,
            min_points=points,
            max_points=points,
            sorted_points=False,
            progress=False,
            streamer=clock,
        )
        clock.ticks = ticks + np.diff(clock.ticks[5::4]).tolist()
    return 1e3 * min(clock.ticks)


@torch.no_grad()
def nll(arguments: argparse.Namespace) -> None:
    corpus = load_corpus(arguments.corpus)
    rows = []
    for name, options in precisions(arguments.device).items():
        model = PointillistForCausalLM.from_pretrained(arguments.model, **options).eval().to(arguments.device)
        config, heldout = model.config, AvatarRows(corpus, "validation", model.input_names)
        grouped = config.level == "point"
        windows = EvaluationWindows(heldout, config.window_tokens, 16, grouped)
        collate = partial(collate_windows, pad_token_id=config.pad_token_id, grouped=grouped)
        sums = torch.zeros(3, 4, dtype=torch.double)
        for batch in DataLoader(windows, 8, collate_fn=collate):
            labels = batch.pop("labels")
            logits = model(**{key: value.to(arguments.device) for key, value in batch.items()}).logits
            sums += slot_sums(logits.cpu().float(), labels, config).sum(0)
        metrics = slot_metrics(sums)
        slots = {f"nats {slot}": metrics[f"nll_{slot}"] for slot in ("y", "face", "z", "x")}
        total = 4 * metrics["nll"]
        above = total - rows[0]["nats per point"] if rows else 0.0
        rows.append(
            {"level": config.level, "precision": name, "nats per point": total, "above float32": above, **slots}
        )
        print(rows[-1], flush=True)
    print(markdown_table(rows))
    print(f"written: {write_report('precision_nll', rows, model=Path(arguments.model).name)}")


class Case:
    """A copy of the model with its optimizer; `best` has the least seconds of forward, backward and update, of one step."""

    def __init__(self, model: PointillistForCausalLM, bf16: bool, options: dict):
        self.model, self.bf16, self.options = copy.deepcopy(model), bf16, options
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        self.best, self.loss = (math.inf,) * 3, math.nan

    def step(self, ids: torch.Tensor, condition: torch.Tensor, timed: bool) -> None:
        ticks = [time.perf_counter()]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = self.model(ids, labels=ids, condition_embeds=condition, use_cache=False, **self.options).loss
        ticks.append(time.perf_counter())
        loss.backward()
        ticks.append(time.perf_counter())
        self.optimizer.step()
        self.optimizer.zero_grad()
        ticks.append(time.perf_counter())
        self.loss = float(loss.detach())
        seconds = tuple(after - before for before, after in pairwise(ticks))
        if timed and sum(seconds) < sum(self.best):
            self.best = seconds


if __name__ == "__main__":
    main()
