"""What `benchmarks/gpu.py` measures: a generator for each part, which yields a row for each measurement.

A row says `what` was measured, then numbers by their units, and a `note` where there are none. Names are the same at every size, so
that a table can put what is expected beside what was measured. Sizes: the paper's, or toys for a CPU.
"""

import argparse
import copy
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from ar_model import CONDITION_TOKENS, SIZES, Bench, memory_bandwidth
from render import front, head, rasterize_reference
from torch import Tensor

from gaussian_tokenizer.animate import FRAMES_AT_ONCE, posed_parts
from gaussian_tokenizer.avatars.gaussians import Gaussians
from gaussian_tokenizer.avatars.motions import synthetic_motion
from gaussian_tokenizer.captures.loading import find_trackings
from gaussian_tokenizer.heads.loading import load_head
from gaussian_tokenizer.rendering import splatting as splatters
from gaussian_tokenizer.rendering.cameras import Cameras, portrait_cameras
from gaussian_tokenizer.rendering.splatting import render
from gaussian_tokenizer.synthesize import main as synthesize
from gaussian_tokenizer.synthetic.subject import synthesize_subject
from gaussian_tokenizer.utils.hub import one_line
from modeling import GaussianDecoder, GaussianDecoderConfig, PointillistConfig, PointillistForCausalLM
from training import fit_avatars, pretrain
from training.common.arguments import parse_arguments
from training.fitting.arguments import FitArguments, FitSettings
from training.fitting.queue import Job
from training.pretraining.metrics import flops_per_token, peak_flops

ROOT = Path(__file__).resolve().parents[1]
T = TypeVar("T")
Row = dict[str, Any]
LEVELS = {"decoding": "ours", "decoding_points": "ours, point level", "decoding_mesh": "ours, point level, mesh-aware"}


@dataclass(frozen=True)
class Setup:
    """Where, and how large."""

    device: torch.device
    toy: bool

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def pick(self, full: T, toy: T) -> T:
        return toy if self.toy else full

    @property
    def points(self) -> int:
        return self.pick(27_000, 100)

    @property
    def head(self) -> str:
        return self.pick("procedural:10144", "procedural:600")

    def bench(self, dtype: str) -> Bench:
        """The point models at both levels, and x-transformers' with the same weights."""
        size = self.pick("paper", "debug")
        window = SIZES[size]["sliding_window"]
        options = dict(size=size, device=self.device, dtype=dtype, rounds=1, new_tokens=1, train_tokens=window)
        return Bench(argparse.Namespace(**options))


def attempt(what: str, measure: Callable[[], Row]) -> Row:
    """A row; an error becomes its note, so that the rows after it are still measured."""
    try:
        return {"what": what, **measure()}
    except Exception as error:
        return {"what": what, "note": f"{type(error).__name__}: {one_line(error)}"}


def timed(setup: Setup, call: Callable[[], object], calls: int, per_call: int = 1) -> tuple[float, Row]:
    """Seconds for each of `per_call` things in a call, warm; on CUDA also the peak, GiB beyond what was allocated before."""
    calls = setup.pick(calls, 1)
    if setup.cuda:
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    for _ in range(setup.pick(2, 1)):
        call()
    synchronize(setup)
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(setup)
    seconds = (time.perf_counter() - begin) / calls / per_call
    return seconds, {"GiB at most": (torch.cuda.max_memory_allocated() - held) / 2**30} if setup.cuda else {}


def synchronize(setup: Setup) -> None:
    if setup.cuda:
        torch.cuda.synchronize()


# ---- splatting


def splatting(setup: Setup) -> Iterator[Row]:
    """gsplat beside the rasterizer for CPUs; on a CPU that one beside the float64 reference."""
    if setup.cuda and splatters._gsplat_rasterization() is None:
        missing = importlib.util.find_spec("gsplat") is None
        yield {"what": "gsplat", "note": "not installed" if missing else "does not work here, see the warning printed"}
        return
    scenes = {  # degree of the colors, azimuths of the cameras, points, pixels
        "degree 0, one camera": (0, [0], *setup.pick((5_000, 128), (200, 32))),
        "degree 1, large Gaussians, three cameras": (1, [0, 40, -70], *setup.pick((300, 64), (40, 24))),
        "degree 2, size of an avatar": (2, [20], *setup.pick((27_000, 512), (300, 40))),
        "degree 3, two cameras": (3, [0, 150], *setup.pick((5_000, 128), (100, 32))),
    }
    for name, (degree, azimuths, points, pixels) in scenes.items():
        cameras = Cameras.orbit((0.0, 0.0, 0.0), 1.0, azimuths, 10.0, pixels / 0.36, pixels, pixels)
        yield attempt(f"difference, {name}", partial(difference, setup, colored(points, degree), cameras))
    pixels = setup.pick(512, 32)
    for degree in (0, 3):
        gaussians, cameras = colored(setup.points, degree).to(setup.device), front(pixels).to(setup.device)
        leaves = [value.requires_grad_() for value in vars(gaussians).values()]

        def forward(gaussians=gaussians, cameras=cameras) -> None:
            with torch.no_grad():
                render(gaussians, cameras)

        def backward(gaussians=gaussians, cameras=cameras, leaves=leaves) -> None:
            torch.autograd.grad(render(gaussians, cameras).image.square().sum(), leaves)

        for what, call in (("forward", forward), ("forward + backward", backward)):
            yield attempt(f"speed, degree {degree}, {what}", partial(frames_per_second, setup, call, 100))


def colored(points: int, degree: int) -> Gaussians:
    """A head (T = 1) whose colors depend on the view, with opacities below 0.95, above which versions of gsplat differ."""
    gaussians, random = head(points), torch.Generator().manual_seed(1)
    sh = 0.3 * torch.randn(points, (degree + 1) ** 2, 3, generator=random)
    return replace(gaussians, sh=sh, opacities=0.95 * gaussians.opacities)


def frames_per_second(setup: Setup, call: Callable[[], object], calls: int, per_call: int = 1) -> Row:
    seconds, memory = timed(setup, call, calls, per_call)
    return {"frames/s": 1 / seconds, **memory}


def difference(setup: Setup, gaussians: Gaussians, cameras: Cameras) -> Row:
    """Largest difference of a color, an alpha or a depth (meters), and of a gradient relative to its norm."""
    reference = through_render if setup.cuda else rasterize_reference
    twin = drawn(reference, gaussians, cameras)
    images, gradients = drawn(through_render, gaussians.to(setup.device), cameras.to(setup.device))
    found = {name: float((images[name] - twin[0][name]).abs().max()) for name in images}
    of_gradient = {name: float((gradients[name] - own).norm() / own.norm()) for name, own in twin[1].items()}
    worst = max(of_gradient, key=lambda name: of_gradient[name])
    return {**found, f"relative, gradient of {worst}": of_gradient[worst], "detail": of_gradient}


def drawn(draw: Callable, gaussians: Gaussians, cameras: Cameras) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Image, alpha and accumulated depth, and the gradients of a sum of them, weighted unevenly; on the CPU in float64."""
    names = ("positions", "quats", "scales", "opacities", "sh")
    leaves = {name: getattr(gaussians, name).detach().requires_grad_() for name in names}
    leaves["viewmats"] = cameras.viewmats.detach().requires_grad_()
    images = draw(*leaves.values(), cameras.Ks, cameras.width, cameras.height)
    loss = sum((x * torch.linspace(-1, 1, x.numel()).to(x).view_as(x)).sum() for x in images)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    images = dict(zip(("color", "alpha", "depth"), images))
    return tuple(
        {k: v.detach().cpu().double() for k, v in group.items()} for group in (images, dict(zip(leaves, gradients)))
    )


def through_render(positions, quats, scales, opacities, sh, viewmats, Ks, width, height) -> tuple[Tensor, ...]:
    gaussians = Gaussians(positions=positions, scales=scales, quats=quats, opacities=opacities, sh=sh)
    image, alpha, depth = render(gaussians, Cameras(viewmats, Ks, width, height), background=0.0)
    return image, alpha, depth * alpha  # the expected depth of a pixel that hardly shows anything is rounding


# ---- the point model


def attention(setup: Setup) -> Iterator[Row]:
    """Logits and loss of every attention function beside eager in float32; sequences twice as long as the window."""
    window = setup.pick(1024, 32)
    for level in ("token", "point"):
        points, own = level == "point", window // (4 if level == "point" else 1)
        size = SIZES[setup.pick("paper", "debug")] | dict(sliding_window=own, use_vision_encoder=False)
        size["intermediate_size"] = 4 * size["hidden_size"]
        torch.manual_seed(0)
        config = PointillistConfig(**size, use_point_encoder=False, level=level, mesh_aware_faces=points)
        model = PointillistForCausalLM(config).to(setup.device).eval()
        models = {torch.float32: model, torch.bfloat16: copy.deepcopy(model).bfloat16()}
        ids = torch.randint(0, config.n_bins, (window // 2, 4), device=setup.device)
        ids[:, 3] += config.n_bins
        inputs = {
            "input_ids": ids.flatten()[None],
            "condition_embeds": torch.randn(1, CONDITION_TOKENS, size["hidden_size"]),
        }
        normals = torch.nn.functional.normalize(torch.randn(1, config.n_faces, 3), dim=-1)
        if points:
            inputs |= {"face_centers": config.n_bins * torch.rand(1, config.n_faces, 3), "face_normals": normals}
        inputs = {name: value.to(setup.device) for name, value in inputs.items()}
        expected = outputs(model, "eager", inputs)
        for dtype, implementations in (
            (torch.float32, ("sdpa", "flex_attention")),
            (torch.bfloat16, ("eager", "sdpa", "flash_attention_2", "flex_attention")),
        ):
            for name in implementations:
                what = f"{level} level, {name}, {str(dtype).removeprefix('torch.')}"
                missing = name == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None
                if not setup.cuda and (missing or (name == "flex_attention" and (points or dtype == torch.bfloat16))):
                    yield {"what": what, "note": "needs CUDA"}
                    continue
                if missing:
                    yield {"what": what, "note": "flash-attn not installed"}
                    continue
                yield attempt(what, partial(deviation, models[dtype], name, inputs, expected))


@torch.no_grad()
def outputs(model: PointillistForCausalLM, implementation: str, inputs: dict[str, Tensor]) -> tuple[Tensor, float]:
    """Logits (B, L, vocabulary) in float32, and the loss in nats a token."""
    model.set_attn_implementation(implementation)
    inputs = inputs | {"condition_embeds": inputs["condition_embeds"].to(model.dtype)}
    loss = model(labels=inputs["input_ids"], use_cache=False, **inputs).loss
    return model(use_cache=False, **inputs).logits.float(), float(loss)


def deviation(
    model: PointillistForCausalLM, name: str, inputs: dict[str, Tensor], expected: tuple[Tensor, float]
) -> Row:
    logits, loss = outputs(model, name, inputs)
    finite = torch.isfinite(expected[0])  # the point level has none for the ids of other slots
    most = float((logits - expected[0])[finite].abs().max())
    return {"in a logit at most": most, "in the loss": abs(loss - expected[1]), "detail": {"loss": expected[1]}}


def decoding(setup: Setup, part: str) -> Iterator[Row]:
    """Seconds a cloud by the rate at a full window: the time of a longer generation less that of a shorter one."""
    bench = setup.bench("bfloat16")
    model = {"ours": bench.ours, **bench.point_level}[LEVELS[part]].eval()
    bandwidth = memory_bandwidth(setup.device)
    yield {"what": "memory bandwidth", "TB/s": bandwidth / 1e12}
    for batch in (8, 1):
        for name, cache in (("eager", None), ("compiled", "static")):
            torch.compiler.reset()  # otherwise the second batch size compiles for batches of any size
            measure = partial(decoding_rate, setup, bench, model, batch, cache, bandwidth)
            row = attempt(f"batch {batch}, {name}", measure)
            yield row if setup.cuda or cache is None else row | {"note": "compiled on CUDA only"}
    if part != "decoding":  # with the step that was compiled last
        yield attempt("batch 1, compiled, a whole cloud", partial(whole_cloud, setup, bench, model))


@torch.no_grad()
def decoding_rate(
    setup: Setup, bench: Bench, model: PointillistForCausalLM, batch: int, cache: str | None, bandwidth: float
) -> Row:
    prompt = bench.prompt.expand(batch, -1)
    options = {name: value.expand(batch, -1, -1) for name, value in bench.faces.items()}
    options |= dict(condition_embeds=bench.condition.expand(batch, -1, -1), cache_implementation=cache)

    def generate(points: int) -> float:
        synchronize(setup)
        begin = time.perf_counter()
        model.generate(
            prompt,
            max_new_tokens=4 * points,
            min_points=prompt.shape[1],
            sorted_points=False,
            progress=False,
            **options,
        )
        synchronize(setup)
        return time.perf_counter() - begin

    short, long = setup.pick((16, 144), (2, 4))
    generate(long)
    rounds = [generate(long) - generate(short) for _ in range(setup.pick(3, 1))]
    per_point = sorted(rounds)[len(rounds) // 2] / (long - short)  # of all rows
    at_token_level = model.config.level == "token"
    read = 4 * bench.bytes_per_token(batch) if at_token_level else bench.bytes_per_point(model, batch)
    return {
        "s a cloud": setup.points * per_point / batch,
        "tokens/s": 4 * batch / per_point,
        "points/s": batch / per_point,
        "of the bandwidth limit": read / bandwidth / per_point,
        "detail": {"extrapolated from points": long - short, "rounds, s": rounds},
    }


@torch.no_grad()
def whole_cloud(setup: Setup, bench: Bench, model: PointillistForCausalLM) -> Row:
    """From the first point to the last, compiled on CUDA; not sorted, as an untrained model reaches the largest y at once."""
    limits = dict(min_points=setup.points, max_points=setup.points, max_points_per_face=15, sorted_points=False)
    begin = time.perf_counter()
    ids = model.generate(
        condition_embeds=bench.condition, cache_implementation="static", progress=False, **limits, **bench.faces
    )
    synchronize(setup)
    return {"s a cloud": time.perf_counter() - begin, "points": (ids.shape[1] - 2) // 4}


def training(setup: Setup) -> Iterator[Row]:
    """Forward and backward of one window in bfloat16 autocast, weights in float32."""
    bench, peak = setup.bench("float32"), peak_flops(setup.device)
    models = {"x-transformers": bench.theirs, "ours": bench.ours, **bench.point_level}
    for name, loss in bench.training_losses().items():

        def step(loss=loss) -> None:
            with torch.autocast(setup.device.type, torch.bfloat16):
                value = loss()
            value.backward()

        def measure(name=name, step=step) -> Row:
            seconds, memory = timed(setup, step, 10)
            ours = bench.ours if name == "x-transformers" else models[name]
            flops = flops_per_token(ours.config, ours.num_decoder_parameters(), bench.train_tokens, CONDITION_TOKENS)
            speed = bench.train_tokens / seconds
            return {"tokens/s": speed, "MFU": speed * flops / peak, **memory}

        yield attempt(name, measure)
        models[name].zero_grad(set_to_none=True)


# ---- the Gaussian decoder, avatars, the trainings


def decoder(setup: Setup) -> Iterator[Row]:
    """Forward and backward of one avatar with its portrait in bfloat16 autocast, weights in float32."""
    vision = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=28)
    toy = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, point_feature_size=32, vision_config=vision)
    config = GaussianDecoderConfig(**setup.pick({}, toy))
    model = GaussianDecoder(config).to(setup.device).train()
    side = config.vision_config.image_size
    shapes = dict(positions=(1, setup.points, 3), point_features=(1, setup.points, 4, config.point_feature_size))
    inputs = {name: 0.1 * torch.randn(shape, device=setup.device) for name, shape in shapes.items()}
    inputs["pixel_values"] = torch.randn(1, 3, side, side, device=setup.device)

    def loss() -> Tensor:
        with torch.autocast(setup.device.type, torch.bfloat16):
            gaussians = model(**inputs)
        return sum(value.square().mean() for value in gaussians.values())

    def measure(call: Callable[[], object]) -> Row:
        seconds, memory = timed(setup, call, 10)
        return {"ms": 1e3 * seconds, **memory}

    yield attempt("forward", lambda: measure(torch.no_grad()(loss)))
    yield attempt("forward + backward", lambda: measure(lambda: loss().backward()))
    model.zero_grad(set_to_none=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    yield attempt("forward + backward, gradient checkpointing", lambda: measure(lambda: loss().backward()))


@torch.no_grad()
def animate(setup: Setup) -> Iterator[Row]:
    """Posing and rendering, a few frames at a time as `pointillist animate` does it."""
    own = load_head(setup.head)
    avatar = synthesize_subject(own, 0, setup.points).avatar.with_head(own).to(setup.device)
    bound, motion = avatar.bind(), synthetic_motion("talk", own, setup.pick(48, 4)).to(setup.device)
    cameras = portrait_cameras(own, setup.pick(512, 48)).to(setup.device)
    yield {"what": "avatar", "points": len(avatar)}
    for animation in ("lbs", "face_frames"):

        def pose(animation=animation) -> list[Gaussians]:
            return list(posed_parts(bound, motion, animation, FRAMES_AT_ONCE))

        def draw(animation=animation) -> list[Tensor]:
            posed = posed_parts(bound, motion, animation, FRAMES_AT_ONCE)
            return [(render(part, cameras).image.clamp(0, 1) * 255 + 0.5).byte().cpu() for part in posed]

        for what, call in (("pose", pose), ("pose, render, fetch", draw)):
            measure = partial(frames_per_second, setup, call, 10, motion.num_frames)
            yield attempt(f"{animation}: {what}", measure)


def fit(setup: Setup) -> Iterator[Row]:
    """A fit of one synthetic subject by `fit_paper.yaml`, cut to few iterations, with density control from early on."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        captured = dict(num_subjects=1, head=setup.head, output_dir=folder / "data", image_size=setup.pick(512, 32))
        synthesize(["--plain", *flags(**captured, views=setup.pick(9, 3), timesteps=setup.pick(3, 2))])
        few = dict(iterations=2_000, densify_from=200, densify_until=2_000, densify_interval=200)
        changes = setup.pick(few, dict(iterations=6)) | dict(max_result_images=0, device=setup.device.type)
        words = flags(data=folder / "data", head=setup.head, output_dir=folder / "fit", disable_tqdm="true", **changes)
        words = [setup.pick("fit_paper", "fit_debug"), *words]
        arguments, settings = parse_arguments(words, FitArguments, FitSettings, description="")
        worker = fit_avatars.Worker(arguments, settings, load_head(arguments.head))
        job = Job(find_trackings(arguments.data)[0], folder / "fit")
        with worker.signals, job.claim():
            worker.fit(job)
        report = json.loads((job.result / "fit_report.json").read_text())
    memory = {"GiB at most": torch.cuda.max_memory_allocated() / 2**30} if setup.cuda else {}
    speed = settings.iterations * settings.images_per_step / report["seconds"]["wall"]
    yield {"what": "fit_paper", "images/s": speed, "points": report["num_points"], "dB": report["psnr"], **memory}


def zero2(setup: Setup) -> Iterator[Row]:
    """A few steps of `paper.yaml` under `accelerate_config.yaml` in one process; without CUDA `debug.yaml`, plainly."""
    if setup.cuda and importlib.util.find_spec("deepspeed") is None:
        yield {"what": "ZeRO-2, one process", "note": "deepspeed not installed"}
        return
    with TemporaryDirectory() as name:
        folder = Path(name)
        points, pixels = setup.pick((27_000, 224), (60, 56))
        corpus = dict(num_subjects=3, head=setup.head, corpus=folder / "corpus", num_points=points, image_size=pixels)
        synthesize(["--plain", *flags(**corpus, tokenizer_image_size=pixels, num_validation=1)])
        words = [setup.pick("paper", "debug"), *flags(corpus=folder / "corpus", output_dir=folder / "model")]
        words += flags(max_steps=setup.pick(6, 2), logging_steps=1, save_strategy="no", disable_tqdm="true")
        if not setup.toy:  # its portrait encoder would have to be fetched; the memory does not depend on the weights
            words += flags(vision_model="", freeze_vision_encoder="true", max_eval_avatars=1)
        launcher = [sys.executable]
        if setup.cuda:
            accelerate = Path(sys.executable).with_name("accelerate")
            launcher = [str(accelerate), "launch", "--config_file", "accelerate_config.yaml", "--num_processes", "1"]
        environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
        command = [*launcher, __file__, str(folder / "memory.json"), *words]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        memory = json.loads((folder / "memory.json").read_text())
        log = json.loads((folder / "model" / "training_log.json").read_text())
    steps = [entry for entry in log if "tokens_per_second" in entry]
    numbers = {"tokens/s": steps[-1]["tokens_per_second"], "MFU": steps[-1]["mfu"]}
    yield {"what": "ZeRO-2, one process", **memory, **numbers, **({} if setup.cuda else {"note": "needs CUDA"})}


def flags(**values: object) -> list[str]:
    return [str(word) for name, value in values.items() for word in (f"--{name}", value)]


def pretrain_and_say_memory(report: Path) -> None:
    """Pre-training with the arguments of this process, then its peak memory as JSON."""
    pretrain.main()
    cuda = torch.cuda.is_available()
    memory = {"GiB allocated": torch.cuda.max_memory_allocated, "GiB reserved": torch.cuda.max_memory_reserved}
    report.write_text(json.dumps({name: read() / 2**30 for name, read in memory.items() if cuda}))


def tests(setup: Setup) -> Iterator[Row]:
    """The tests marked `gpu`, which skip themselves without CUDA."""
    where = setup.pick("tests", "tests/gaussian_tokenizer/rendering/test_splatting.py")
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", where]
    run = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(run.stdout, flush=True)
    yield {"what": "pytest -m gpu", "note": run.stdout.strip().rpartition("\n")[2].strip("= ")}
    if run.returncode not in (0, 5):
        raise RuntimeError(f"tests failed: {run.stdout[-2000:]}")


PARTS: dict[str, Callable[[Setup], Iterator[Row]]] = {
    "tests": tests,
    "splatting": splatting,
    "attention": attention,
    **{name: partial(decoding, part=name) for name in LEVELS},
    "training": training,
    "decoder": decoder,
    "animate": animate,
    "fit": fit,
    "zero2": zero2,
}

if __name__ == "__main__":
    pretrain_and_say_memory(Path(sys.argv.pop(1)))
