"""Training steps of the point model in float32 and bfloat16 (autocast), with and without a mask in self-attention.

    python benchmarks/precision.py                  # on a CPU, two or three minutes; one thread
    python benchmarks/precision.py --head_dim 64

Each row trains its own copy of one model on the same windows. The rows take turns; each counts its best round. On a machine with
other work, ratios mean more than speeds: the load average before and after is recorded. The data is a random walk over the
coordinates, whose next token is one of four, so a model that has learned it is at 1.39 nats.
"""

import argparse
import copy
import math
import os
import time
from itertools import pairwise

import torch
from report import markdown_table, write_report

from gaussian_tokenizer.utils.precision import supports_bf16
from modeling import PointillistConfig, PointillistForCausalLM

CONDITION_TOKENS = 65


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--window", type=int, default=1024, help="tokens in a window")
    parser.add_argument("--windows", type=int, default=4, help="in a step")
    parser.add_argument("--head_dim", type=int, default=32, help="channels of a head")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
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
