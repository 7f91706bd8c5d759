"""Self- and cross-reenactment of a dataset of tracked subjects: how good is a model, compared with which methods?

    python eval/reenactment_bench.py --model outputs/demo/pipeline --dataset subjects --mode both --output_dir outputs/bench

An avatar is made of the first frame of each clip and driven by the rest of the clip (self) or by another subject's clip (cross).
Writes results.json (every number, with the protocol), results.md (the table), grid.png, a video of every pair, and report.html,
one page with all of it. Frames of other methods enter as folders (--compare NAME=DIR), made from what --export_protocol writes;
see docs/reenactment_bench.md for the layout. A killed run resumes when the same command is given again.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from eval.networks.registry import NetworkOptions, add_network_flags, open_networks
from eval.reenactment.clips import FILE_NAME, Clip, digest, open_dataset
from eval.reenactment.methods import (
    BUILT_IN,
    Method,
    compared,
    copy_source,
    flame_position_maker,
    make_avatars,
    mean_image,
    ours_maker,
    rendered,
    truth,
)
from eval.reenactment.protocol import MODES, Pair, by_mode, describe, describe_protocol, export_protocol, make_pairs
from eval.reenactment.report import markdown, measured_block
from eval.reenactment.report_html import page
from eval.reenactment.report_images import draw_grid, save_pair_video
from eval.reenactment.run_folder import RUN_NAME, claim, weights_digest, write
from eval.reenactment.scores import FeatureFiles, describe_networks, missing_networks, summarize
from eval.reenactment.speed import measure
from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.utils.options import from_options
from gaussian_tokenizer.utils.versions import installed_versions
from modeling import AvatarPipeline, GaussianDecoder
from modeling.pipeline import CANDIDATES

FORMAT = "avatar-pointillist reenactment results 1"
PACKAGES = ("avatar-pointillist", "torch", "transformers", "numpy", "pillow", "gsplat")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="pipeline: a folder or a Hub id")
    parser.add_argument("--dataset", required=True, help="folder of tracked subjects, or a corpus folder")
    parser.add_argument("--mode", choices=(*MODES, "both"), default="both", help="reenactment mode (default: both)")
    parser.add_argument("--output_dir", type=Path, help="folder for the results; the same command resumes in it")
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="frames of another method, <DIR>/<mode>/<source>__<driver>/00001.png or .mp4; may be repeated",
    )
    parser.add_argument("--export_protocol", type=Path, metavar="DIR", help="write what another method needs, and exit")
    parser.add_argument("--flame_position", metavar="DIR", help="decoder of mode flame_position, for a row of its own")
    parser.add_argument("--num_subjects", type=int, help="only the first subjects, sorted by name (default: all)")
    parser.add_argument("--num_frames", type=int, help="only the first frames of each camera (default: all)")
    parser.add_argument("--camera", type=int, help="number of the only camera to use (default: all cameras)")
    parser.add_argument("--split", default="validation", help="split of a corpus: validation (default) or test")
    parser.add_argument("--seed", type=int, default=0, help="seed of avatars, pairs and intervals (default: 0)")
    parser.add_argument("--batch_size", type=int, default=4, help="avatars generated together (default: 4)")
    parser.add_argument(
        "--candidates",
        type=int,
        default=CANDIDATES,
        help=f"point clouds generated per source; the most likely one is decoded (default: {CANDIDATES})",
    )
    parser.add_argument("--max_points", type=int, help="maximum number of points of an avatar (default: no limit)")
    parser.add_argument("--max_points_per_face", type=int, default=15, help="maximum per mesh face (default: 15)")
    parser.add_argument("--num_threads", type=int, default=1, help="threads of torch (default: 1)")
    add_network_flags(parser)
    arguments = parser.parse_args()
    try:
        run(arguments)
    except (ValueError, OSError, ImportError) as error:
        parser.exit(1, f"error: {error}\n")


def run(arguments: argparse.Namespace) -> None:
    """Open everything, make and score the rows, write the report."""
    begin = time.perf_counter()
    check(arguments)
    folders = parse_compare(arguments.compare)
    torch.set_num_threads(arguments.num_threads)
    pipeline = AvatarPipeline.from_pretrained(arguments.model, device=arguments.device)
    chosen = (arguments.split, arguments.camera, arguments.num_subjects, arguments.num_frames)
    clips = open_dataset(arguments.dataset, pipeline.head.to("cpu"), *chosen)
    pairs = make_pairs(clips, arguments.mode, arguments.seed)
    if arguments.export_protocol is not None:
        export_protocol(arguments.export_protocol, pairs, arguments.seed)
        print(f"{len(pairs)} pairs of {len(clips)} subjects in {arguments.export_protocol}")
        return
    networks = open_networks(from_options(NetworkOptions, vars(arguments)))
    decoder = None if arguments.flame_position is None else open_flame_position(arguments.flame_position, pipeline)
    output: Path = arguments.output_dir
    claim(output, identity(arguments, pipeline, decoder, clips))

    methods, generation = make_methods(arguments, folders, pipeline, decoder, clips, pairs)
    files = FeatureFiles(output / "scores", networks)
    run_name = {"model_name": str(arguments.model), "dataset_name": str(arguments.dataset)}
    results = {
        "format": FORMAT,
        "run": run_name | json.loads((output / RUN_NAME).read_text()),
        "modes": list(by_mode(pairs)),
        "num_pairs": {mode: len(own) for mode, own in by_mode(pairs).items()},
        "subjects": [clip.subject_id for clip in clips],
        "image": list(clips[0].size),
        "pairs": [describe(pair) for pair in pairs],
        "protocol": describe_protocol(vars(arguments)),
        "networks": describe_networks(networks),
        "versions": installed_versions(PACKAGES),
        "methods": score(methods, pairs, clips, files, arguments.seed, folders),
    }
    avatar = GaussianAvatar.load(output / "avatars" / "ours" / pairs[0].source.subject_id, head=pipeline.head)
    results["speed"] = measure(avatar.to(arguments.device), pairs[0], generation, arguments.device)
    results = for_json(results)
    draw_grid(output / "grid.png", pairs, methods)
    videos = [
        save_pair_video(pair.path(output / "videos"), pair, methods) for pair in tqdm(pairs, desc="videos", unit="pair")
    ]
    results["seconds"] = round(time.perf_counter() - begin, 1)
    write(output / "results.md", markdown(results))
    write(output / "report.html", page(results, output, videos))
    write(output / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    print(f"\n{measured_block(results)}\nwrote {output / 'report.html'} in {results['seconds']} s")


def check(arguments: argparse.Namespace) -> None:
    """Refuse wrong arguments before anything is loaded."""
    if arguments.output_dir is None and arguments.export_protocol is None:
        raise ValueError("neither --output_dir nor --export_protocol is given")
    for name, value in vars(arguments).items():
        if isinstance(value, int) and value < 1 and name not in ("camera", "seed"):
            raise ValueError(f"--{name} is {value}, expected at least 1")
    try:
        torch.zeros(1, device=arguments.device)
    except (RuntimeError, AssertionError) as error:  # an assertion in a build without CUDA
        raise ValueError(f"--device {arguments.device}: not available ({error})") from error


def parse_compare(given: Sequence[str]) -> dict[str, Path]:
    """NAME=DIR of every compared method."""
    folders: dict[str, Path] = {}
    for text in given:
        name, _, folder = text.partition("=")
        if not FILE_NAME.fullmatch(name) or not folder:
            raise ValueError(f"--compare {text!r}: expected NAME=DIR")
        if name in (*BUILT_IN, *folders, "clips"):
            raise ValueError(f"--compare {text!r}: the name is taken; choose another")
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"--compare {text}: no such folder; --export_protocol writes what it must contain")
        folders[name] = Path(folder)
    return folders


def open_flame_position(name: str, pipeline: AvatarPipeline) -> GaussianDecoder:
    """The decoder of the ablation; ValueError if it has another mode."""
    try:
        decoder = GaussianDecoder.from_pretrained(name).eval().to(pipeline.device)
    except OSError as error:
        raise FileNotFoundError(f"--flame_position {name}: {' '.join(str(error).split())}") from None
    if decoder.config.mode != "flame_position":
        raise ValueError(f"--flame_position {name}: its mode is {decoder.config.mode!r}, expected 'flame_position'")
    return decoder


def identity(
    arguments: argparse.Namespace, pipeline: AvatarPipeline, decoder: GaussianDecoder | None, clips: Sequence[Clip]
) -> dict[str, Any]:
    """What determines a run's avatars and frames. Networks and compared folders may change: only scores depend on them."""
    networks = [pipeline.point_model, pipeline.gaussian_decoder]
    settings = [pipeline.tokenizer.to_dict(), *(net.config.to_dict() for net in networks), pipeline.head.hash]
    names = ("mode", "seed", "batch_size", "candidates", "max_points", "max_points_per_face", "num_frames")
    return {
        "model": weights_digest(networks, settings),
        "flame_position": None if decoder is None else weights_digest([decoder], [decoder.config.to_dict()]),
        "dataset": digest(clips),
        "subjects": [clip.subject_id for clip in clips],
        "device": torch.device(arguments.device).type,
        **{name: getattr(arguments, name) for name in names},
    }


def make_methods(
    arguments: argparse.Namespace,
    folders: dict[str, Path],
    pipeline: AvatarPipeline,
    decoder: GaussianDecoder | None,
    clips: Sequence[Clip],
    pairs: Sequence[Pair],
) -> tuple[list[Method], list[dict[str, Any]]]:
    """Make the avatars; returns the rows of the table, and the generation stats of "ours"."""
    output: Path = arguments.output_dir
    others = [compared(name, folder, pairs) for name, folder in folders.items()]
    for method in others:
        for mode, problems in method.absent.items():
            print(f"{method.name}, {mode}: refused\n  " + "\n  ".join(problems), flush=True)
    limits = {"max_points": arguments.max_points, "max_points_per_face": arguments.max_points_per_face}
    maker = ours_maker(pipeline, arguments.seed, candidates=arguments.candidates, **limits, progress=False)
    generation = make_avatars("ours", maker, clips, output, arguments.batch_size)
    about = {"ours": f"the pipeline {arguments.model}"}
    if decoder is not None:
        make_avatars("flame_position", flame_position_maker(pipeline, decoder), clips, output, arguments.batch_size)
        about["flame_position"] = (
            f"Gaussians on the vertices of the head, by {arguments.flame_position}: the paper's ablation"
        )
    own = [rendered(name, text, pipeline.head, output, arguments.device) for name, text in about.items()]
    return [truth(), *own, *others, copy_source(), mean_image(clips)], generation


def score(
    methods: Sequence[Method],
    pairs: Sequence[Pair],
    clips: Sequence[Clip],
    files: FeatureFiles,
    seed: int,
    folders: dict[str, Path],
) -> dict[str, Any]:
    """Render and score every frame of every method: `results["methods"]`."""
    missing = missing_networks(files.networks)
    true = {clip.subject_id: files.of_clip(clip) for clip in tqdm(clips, desc="true frames", unit="clip")}
    rows: dict[str, dict[str, Any]] = {}
    for method in methods:
        rows[method.name] = {"about": method.about, "compared": method.name in folders}
        for mode, own in by_mode(pairs).items():
            if mode in method.absent:
                rows[method.name][mode] = {"absent": list(method.absent[mode])}
                continue
            progress = tqdm(own, desc=f"{method.name}, {mode}", unit="pair")
            features = [files.of_frames(method.name, pair, method.frames(pair)) for pair in progress]
            rows[method.name][mode] = summarize(own, features, true, missing, seed)
    return rows


def for_json(value: Any) -> Any:
    """JSON has no infinity and no NaN: the word "inf", and null."""
    if isinstance(value, dict):
        return {key: for_json(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [for_json(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


if __name__ == "__main__":
    main()
