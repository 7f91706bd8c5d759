"""Speed of the point model, compared with x-transformers, the library the paper used, and with the memory-bandwidth limit.

    python benchmarks/ar_model.py --size small            # on a CPU, two or three minutes
    python benchmarks/ar_model.py --size paper --dtype bfloat16 --device cuda
    python benchmarks/ar_model.py --size paper --parts generation --new_tokens 8   # the paper's size on a CPU: slow
    python benchmarks/ar_model.py --size debug --parts length                      # time and memory a point, up to 27,000 points
    python benchmarks/ar_model.py --size paper --parts points                      # steps of the point level only: minutes
    python benchmarks/ar_model.py --size small --parts candidates                  # several clouds of one subject, side by side

Training: forward and backward on 2,048 tokens (--train_tokens). Generation: tokens after a prompt that fills the window, so that
every step attends to all of it, timed from the first new token to the last, without the prompt. Both models have the same weights
and decode greedily; rows of the point level have the same decoder, whose window holds the same number of points. The rows take
turns in one run; each counts its best round.

The limit of generation is the time to read from memory once what a step reads (weights, but not those that made the condition's
keys and values; the keys and values of window and condition), at the bandwidth measured in the same run (a matrix-vector product
over a large array; CPU caches can exceed it).
"""

import argparse
import math
import time
import warnings
from collections.abc import Callable
from functools import cached_property, partial

import numpy as np
import torch
import torch.nn.functional as F
from report import markdown_table, write_report
from transformers.generation.streamers import BaseStreamer
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

from modeling import PointillistConfig, PointillistForCausalLM, RingCache
from modeling.convert_x_transformers import load_x_transformers

SIZES = {
    "debug": dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, sliding_window=256),
    "small": dict(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, sliding_window=4000),
    "paper": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, sliding_window=12000),
}
CONDITION_TOKENS = 257
CLOUD = 27_000  # points of the paper's clouds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--new_tokens", type=int, default=32, help="generated tokens that are timed")
    parser.add_argument(
        "--train_tokens", type=int, help="tokens of a training sequence (default: 2,048, at most the window)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=["training", "generation", "length", "points", "candidates"],
        default=["training", "generation"],
    )
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    bench = Bench(arguments)
    rows = []
    for part in arguments.parts:
        rows += getattr(bench, part)()
    print(markdown_table(rows))
    parts = "" if set(arguments.parts) & {"training", "generation"} else "_" + "_".join(arguments.parts)
    path = write_report(
        f"ar_model_{arguments.size}_{bench.device.type}_{arguments.dtype}{parts}",
        rows,
        size=SIZES[arguments.size],
        dtype=arguments.dtype,
        threads=torch.get_num_threads(),
        parameters=next(
            iter(bench.point_level.values() if parts == "_points" else [bench.ours])
        ).num_decoder_parameters(),
    )
    print(f"\nwritten: {path}")


class Bench:
    """The same weights in both libraries, and the data for timing them."""

    def __init__(self, arguments: argparse.Namespace):
        self.device, self.dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
        self.rounds, self.new_tokens = arguments.rounds, arguments.new_tokens
        size = SIZES[arguments.size]
        self.size = size | dict(
            intermediate_size=4 * size["hidden_size"], use_vision_encoder=False, use_point_encoder=False
        )
        self.config = PointillistConfig(**self.size)
        torch.manual_seed(0)
        self.train_tokens = arguments.train_tokens or min(2048, self.config.sliding_window)
        self.condition = torch.randn(1, CONDITION_TOKENS, size["hidden_size"], device=self.device, dtype=self.dtype)
        self.prompt = valid_prompt(self.config).to(self.device)
        self.window = self.prompt[:, : self.config.sliding_window]
        self.points_prompt = self.prompt[:, :-4]  # bos and points that fill the window of the point level
        self.point_level = {
            "ours, point level": self.point_model(False),
            "ours, point level, mesh-aware": self.point_model(True),
        }
        faces = torch.randn(2, 1, self.config.n_faces, 3, device=self.device, dtype=self.dtype)
        self.faces = {
            "face_centers": self.config.n_bins / 2 * (1 + faces[0] / 3),
            "face_normals": F.normalize(faces[1], dim=-1),
        }

    @cached_property
    def theirs(self) -> TransformerWrapper:
        decoder = Decoder(
            dim=self.config.hidden_size,
            depth=self.config.num_hidden_layers,
            heads=self.config.num_attention_heads,
            attn_dim_head=self.config.head_dim,
            cross_attend=True,
            rotary_pos_emb=True,
            use_rmsnorm=True,
            attn_flash=True,
        )
        tokens, window = self.config.vocab_size, self.config.sliding_window
        model = TransformerWrapper(num_tokens=tokens, max_seq_len=window, use_abs_pos_emb=False, attn_layers=decoder)
        return model.to(self.device, self.dtype)

    @cached_property
    def wrapper(self) -> AutoregressiveWrapper:
        return AutoregressiveWrapper(self.theirs, pad_value=self.config.pad_token_id)

    @cached_property
    def ours(self) -> PointillistForCausalLM:
        model = PointillistForCausalLM(self.config)
        load_x_transformers(model, self.theirs.state_dict())
        return model.to(self.device, self.dtype)

    def point_model(self, mesh_aware: bool) -> PointillistForCausalLM:
        window = self.config.sliding_window // 4
        changes = dict(level="point", mesh_aware_faces=mesh_aware, sliding_window=window)
        return PointillistForCausalLM(PointillistConfig(**self.size | changes)).to(self.device, self.dtype)

    def training(self) -> list[dict]:
        calls = {name: lambda loss=loss: loss().backward() for name, loss in self.training_losses().items()}
        seconds = self.time_in_turns(calls)
        return [
            row("training", name, self.train_tokens / s, seconds["x-transformers"] / s) for name, s in seconds.items()
        ]

    def training_losses(self) -> dict[str, Callable[[], torch.Tensor]]:
        """The loss of `train_tokens` tokens by each model, in training mode."""
        ids = self.window[:, : self.train_tokens]
        # AutoregressiveWrapper predicts all but the first token of its input, as our labels do.
        losses = {
            "x-transformers": lambda: self.wrapper(ids, context=self.condition),
            "ours": lambda: self.ours(ids, labels=ids, condition_embeds=self.condition, use_cache=False).loss,
        }
        groups = F.pad(ids[:, :-3], (3, 0), value=self.config.pad_token_id)
        labels = groups.clone()
        labels[:, :4] = -100
        for name, model in self.point_level.items():
            model.train()
            losses[name] = lambda model=model: (
                model(groups, labels=labels, condition_embeds=self.condition, use_cache=False, **self.faces).loss
            )
        self.theirs.train()
        self.ours.train()
        return losses

    def generation(self) -> list[dict]:
        self.theirs.eval()
        self.ours.eval()

        clock = Clock(self.device)
        self.theirs.to_logits.register_forward_hook(lambda *_: clock.put(None))

        def theirs() -> None:
            self.wrapper.generate(
                self.window, 1 + self.new_tokens, temperature=0.0, cache_kv=True, context=self.condition
            )

        def ours(**options) -> None:
            self.ours.generate(
                self.window,
                condition_embeds=self.condition,
                do_sample=False,
                max_new_tokens=1 + self.new_tokens,
                progress=False,
                streamer=clock,
                **{"grammar": False, **options},
            )

        generators: dict[str, Callable[[], None]] = {
            "x-transformers": theirs,
            "transformers' loop, dynamic cache": lambda: ours(
                cache_implementation="dynamic", output_logits=True, return_dict_in_generate=True
            ),
            "ours": ours,
            "ours, grammar": lambda: ours(grammar=True, min_points=self.new_tokens + self.config.sliding_window),
        }
        if self.device.type == "cuda":
            generators["ours, static cache, compiled"] = lambda: ours(cache_implementation="static")

        def by_points(model: PointillistForCausalLM) -> None:
            model.eval().generate(
                self.points_prompt,
                condition_embeds=self.condition,
                do_sample=False,
                max_new_tokens=1 + self.new_tokens,
                progress=False,
                streamer=clock,
                min_points=self.new_tokens + self.config.sliding_window,
                sorted_points=False,
                **self.faces,
            )

        for name, model in self.point_level.items():
            generators[name] = partial(by_points, model)
        steps = dict.fromkeys(generators, math.inf)
        for turn in range(self.rounds + 1):
            for name, generate in generators.items():
                clock.ticks.clear()
                with torch.no_grad():
                    generate()
                if turn:  # the first round warms up
                    ticks = clock.ticks[-1 - self.new_tokens :]
                    steps[name] = min(steps[name], (ticks[-1] - ticks[0]) / self.new_tokens)
            print(f"round {turn} of {self.rounds}" + (" (warm-up)" if not turn else ""), flush=True)
        base = steps["x-transformers"]
        rows = [row("generation", name, 1 / s, base / s) for name, s in steps.items()]
        bandwidth = memory_bandwidth(self.device)
        limit = bandwidth / self.bytes_per_token()
        rows.append(row("generation", "limit: memory bandwidth", limit, limit * base))
        for name, model in self.point_level.items():
            limit = 4 * bandwidth / self.bytes_per_point(model)
            rows.append(row("generation", f"limit of {name}: memory bandwidth", limit, limit * base))
        return rows

    def length(self) -> list[dict]:
        """Milliseconds a point and peak memory of a whole cloud of 27,000 points, early and late."""
        rows = []
        models = {"ours": self.ours} | self.point_level
        for name, model in models.items():
            clock = Clock(self.device)
            torch.manual_seed(0)
            with torch.no_grad():
                model.eval().generate(
                    condition_embeds=self.condition,
                    max_points=CLOUD,
                    min_points=CLOUD,
                    max_points_per_face=15,
                    sorted_points=False,  # an untrained model reaches the top too early, where the sequence must end
                    progress=False,
                    streamer=clock,
                    **self.faces,
                )
            for first in (100, 3_000, 10_000, CLOUD - 1_000):
                ticks = clock.ticks[1 + 4 * first : 2 + 4 * (first + 900)]
                rows.append(
                    {
                        "task": "length",
                        "row": name,
                        "from point": first,
                        "ms a point": 1e3 * float(np.median(np.diff(ticks[::4]))),
                    }
                )
        return rows

    def points(self) -> list[dict]:
        """Steps of the point level against the limit. Keys and values of the window are random numbers: no prompt is read."""
        clock = Clock(self.device, by_cpu=self.device.type == "cpu" and torch.get_num_threads() == 1)
        ways = {"greedy": dict(do_sample=False), "sampled": dict(top_p=0.95, temperature=0.9, max_points_per_face=15)}
        runs = {(name, way): (model, ways[way]) for name, model in self.point_level.items() for way in ways}
        steps, bandwidth = dict.fromkeys(runs, math.inf), 0.0
        for turn in range(self.rounds + 1):
            bandwidth = max(bandwidth, memory_bandwidth(self.device, clock.now))
            for run, (model, options) in runs.items():
                clock.ticks.clear()
                model.eval().generate(
                    self.points_prompt,
                    condition_embeds=self.condition,
                    cache=full_ring(model),
                    max_new_tokens=1 + self.new_tokens,
                    progress=False,
                    streamer=clock,
                    min_points=self.new_tokens + self.config.sliding_window,
                    sorted_points=False,
                    **options,
                    **self.faces,
                )
                ticks = clock.ticks[-1 - self.new_tokens :: 4]
                if turn:  # the first round warms up
                    steps[run] = min(steps[run], *np.diff(ticks))
            print(f"round {turn} of {self.rounds}" + (" (warm-up)" if not turn else ""), flush=True)
        return [
            {
                "task": "points",
                "row": ", ".join(run),
                "ms a point": 1e3 * seconds,
                "of the limit": self.bytes_per_point(runs[run][0]) / bandwidth / seconds,
            }
            for run, seconds in steps.items()
        ]

    def candidates(self) -> list[dict]:
        """Clouds of one subject side by side, which share its condition, and with a copy of it for each: time a point, memory."""
        condition = torch.cat((self.condition, self.condition), 1)[:, :-1]  # 257 tokens of a portrait, 256 of a mesh
        rows = []
        for name, model in ({"ours": self.ours} | self.point_level).items():
            for count in (1, 4, 8):
                shared = {"condition_embeds": condition} | (self.faces if model.config.mesh_aware_faces else {})
                copied = {key: value.repeat_interleave(count, 0) for key, value in shared.items()}
                best = {"shared": math.inf} if count == 1 else {"copied": math.inf, "shared": math.inf}
                size = {}
                for turn in range(self.rounds + 1):
                    for key in best:
                        milliseconds, size[key] = self.time_candidates(
                            model, count, copied if key == "copied" else shared
                        )
                        best[key] = min(best[key], milliseconds) if turn else math.inf
                rows += [
                    {
                        "task": "candidates",
                        "row": name,
                        "clouds": count,
                        "condition": key,
                        "ms a point of each": best[key],
                    }
                    | size[key]
                    for key in best
                ]
                print(rows[-1], flush=True)
        return rows

    @torch.no_grad()
    def time_candidates(self, model: PointillistForCausalLM, count: int, given: dict) -> tuple[float, dict]:
        """Milliseconds in which `count` clouds get a point each, median after the first, and MiB of what they share.

        On a CPU processor time, to be used with one thread: the same on a machine with other work.
        """
        clock = Clock(self.device, by_cpu=self.device.type == "cpu")
        limits = dict(min_points=1 + self.new_tokens // 4, max_points=1 + self.new_tokens // 4, sorted_points=False)
        cache = (
            model.eval()
            .generate(
                inputs=torch.full((count, 1), self.config.bos_token_id, device=self.device),
                **given,
                **limits,
                progress=False,
                streamer=clock,
                return_dict_in_generate=True,
            )
            .past_key_values.cross_attention_cache
        )
        faces = [given[key] for key in self.faces if key in given]
        tables = model.model.embed_tokens.faces(*faces) if faces else ()
        tensors = {
            "MiB keys and values of the condition": [each for own in cache.layers for each in (own.keys, own.values)],
            "MiB faces": tables,
        }
        sizes = {key: sum(each.nbytes for each in own) / 2**20 for key, own in tensors.items()}
        return 1e3 * float(np.median(np.diff(clock.ticks[5::4]))), sizes

    def bytes_per_token(self, batch: int = 1) -> int:
        """Read in a step of `batch` rows: decoder and head, and keys and values of the window and the condition."""
        return self.bytes_read(self.ours, 0, batch)

    def bytes_per_point(self, model: PointillistForCausalLM, batch: int = 1) -> int:
        """The same of a step at the point level: also what embeds a point's coordinates, and the vectors of all faces."""
        coordinates = sum(parameter.numel() for parameter in model.model.embed_tokens.coordinates.parameters())
        return self.bytes_read(model, coordinates + model.config.n_faces * model.config.hidden_size, batch)

    def bytes_read(self, model: PointillistForCausalLM, others: int, batch: int) -> int:
        """With the numbers of `others`, without the weights that make the condition's keys and values, which are kept."""
        config = model.config
        inner = config.num_attention_heads * config.head_dim
        decoder = (*model.model.layers.parameters(), *model.lm_head.parameters())
        unread = 2 * config.num_hidden_layers * config.hidden_size * inner
        cache = 2 * config.num_hidden_layers * inner * (config.sliding_window + CONDITION_TOKENS)
        weights = sum(parameter.numel() for parameter in decoder) + others - unread
        return (weights + batch * cache) * self.dtype.itemsize

    def time_in_turns(self, calls: dict) -> dict:
        """Best seconds of each call; every round runs all of them, after a warm-up round."""
        best = dict.fromkeys(calls, math.inf)
        for turn in range(self.rounds + 1):
            for name, call in calls.items():
                self.synchronize()
                begin = time.perf_counter()
                call()
                self.synchronize()
                if turn:
                    best[name] = min(best[name], time.perf_counter() - begin)
            print(f"round {turn} of {self.rounds}" + (" (warm-up)" if not turn else ""), flush=True)
        return best

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def valid_prompt(config: PointillistConfig) -> torch.Tensor:
    """bos and as many points (1, 1 + 4 N) as the window has room for, sorted, in the lower half of the box."""
    bins = torch.randint(0, config.n_bins, (config.sliding_window // 4, 3)) // torch.tensor([1, 2, 1])
    faces = config.n_bins + torch.randint(0, config.n_faces, (len(bins), 1))
    x, y, z = bins.T
    order = ((y * config.n_bins + z) * config.n_bins + x).argsort()
    points = torch.cat((bins, faces), dim=1)[order]
    return F.pad(points.flatten(), (1, 0), value=config.bos_token_id)[None]


def full_ring(model: PointillistForCausalLM) -> RingCache:
    """A cache that holds all but the newest position of a window, with random keys and values."""
    config = model.config
    cache = RingCache(config.num_hidden_layers, config.sliding_window)
    empty = torch.zeros(1, config.num_attention_heads, 1, config.head_dim, device=model.device, dtype=model.dtype)
    for layer in cache.layers:
        layer.lazy_initialization(empty, empty)
        layer.keys.normal_()
        layer.values.normal_()
        layer.counted = config.sliding_window - 1
        layer.position.fill_(layer.counted)
    return cache


class Clock(BaseStreamer):
    """Records the time of every token; `by_cpu`: the time of the process, which other work on the machine disturbs less."""

    def __init__(self, device: torch.device, by_cpu: bool = False):
        self.device = device
        self.now = time.process_time if by_cpu else time.perf_counter
        self.ticks: list[float] = []

    def put(self, value) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.ticks.append(self.now())

    def end(self) -> None:
        pass


def row(task: str, name: str, speed: float, ratio: float) -> dict:
    return {"task": task, "row": name, "tokens/s": speed, "x x-transformers": ratio}


def memory_bandwidth(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Bytes per second that a matrix-vector product reads from 512 MiB (8 GiB on CUDA), best of ten."""
    # On a GPU 512 MiB take a tenth of a millisecond, little more than starting the product and fetching a number of it.
    matrix = torch.ones(2**18 if device.type == "cuda" else 2**14, 2**13, device=device)
    vector = torch.ones(2**13, device=device)
    best = math.inf
    for _ in range(10):
        begin = clock()
        float((matrix @ vector)[0])
        best = min(best, clock() - begin)
    return matrix.nbytes / best


if __name__ == "__main__":
    main()
