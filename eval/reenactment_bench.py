"""Self- and cross-reenactment of a dataset of tracked subjects: how good is a model, compared with which methods?

    python eval/reenactment_bench.py --model outputs/demo/pipeline --dataset subjects --mode both --output_dir outputs/bench

An avatar is made of the first frame of each clip and driven by the rest of the clip (self) or by another subject's clip (cross).
Writes results.json, results.md, grid.png, a video of every pair, and report.html with all of it. Frames of other methods enter as
folders, made from what --export_protocol writes (docs/reenactment_bench.md). The same command resumes a killed run.
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
from eval.reenactment.methods import BUILT_IN, Method, make_methods
from eval.reenactment.protocol import MODES, Pair, by_mode, describe, describe_protocol, export_protocol, make_pairs
from eval.reenactment.report import markdown, measured_block
from eval.reenactment.report_html import page
from eval.reenactment.report_images import draw_grid, save_pair_video
from eval.reenactment.run_folder import claim, weights_digest, write
from eval.reenactment.scores import FeatureFiles, describe_networks, missing_networks, summarize
from eval.reenactment.speed import measure
from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.utils.hub import one_line
from gaussian_tokenizer.utils.options import from_options
from gaussian_tokenizer.utils.versions import installed_versions
from modeling import AvatarPipeline, GaussianDecoder
from modeling.pipeline import CANDIDATES

FORMAT = "avatar-pointillist reenactment results 1"
PACKAGES = ("avatar-pointillist", "torch", "transformers", "numpy", "pillow", "gsplat")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="pipeline: a folder or a Hub id")
    add("--dataset", required=True, help="folder of tracked subjects, or a corpus folder")
    add("--mode", choices=(*MODES, "both"), default="both", help="reenactment mode (default: both)")
    add("--output_dir", type=Path, help="folder for the results; the same command resumes in it")
    compare = "frames of another method, <DIR>/<mode>/<source>__<driver>/00001.png or .mp4; may be repeated"
    add("--compare", action="append", default=[], metavar="NAME=DIR", help=compare)
    add("--export_protocol", type=Path, metavar="DIR", help="write what another method needs, and exit")
    add("--flame_position", metavar="DIR", help="decoder of mode flame_position, for a row of its own")
    add("--num_subjects", type=int, help="only the first subjects, sorted by name (default: all)")
    add("--num_frames", type=int, help="only the first frames of each camera (default: all)")
    references = "frames of a subject that its avatar is made of, evenly spaced, the source among them (default: 1)"
    add("--num_references", type=int, default=1, help=references)
    add("--camera", type=int, help="number of the only camera to use (default: all cameras)")
    add("--split", default="validation", help="split of a corpus: validation (default) or test")
    add("--seed", type=int, default=0, help="seed of avatars, pairs and intervals (default: 0)")
    add("--batch_size", type=int, default=4, help="avatars generated together (default: 4)")
    candidates = f"point clouds generated per source; the most likely one is decoded (default: {CANDIDATES})"
    add("--candidates", type=int, default=CANDIDATES, help=candidates)
    add("--max_points", type=int, help="maximum number of points of an avatar (default: no limit)")
    add("--max_points_per_face", type=int, default=15, help="maximum per mesh face (default: 15)")
    add("--num_threads", type=int, default=1, help="threads of torch (default: 1)")
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
    chosen = (arguments.split, arguments.camera, arguments.num_subjects, arguments.num_frames, arguments.num_references)
    clips = open_dataset(arguments.dataset, pipeline.head.to("cpu"), *chosen)
    pairs = make_pairs(clips, arguments.mode, arguments.seed)
    if arguments.export_protocol is not None:
        export_protocol(arguments.export_protocol, pairs, arguments.seed)
        print(f"{len(pairs)} pairs of {len(clips)} subjects in {arguments.export_protocol}")
        return
    if arguments.num_references > 1 and not pipeline.gaussian_decoder.config.read_portrait:
        raise ValueError(
            f"--num_references {arguments.num_references}: the decoder of {arguments.model} does not read the portrait "
            "(read_portrait is False); give 1, or a pipeline whose decoder was trained with --read_portrait true"
        )
    networks = open_networks(from_options(NetworkOptions, vars(arguments)))
    decoder = None if arguments.flame_position is None else open_flame_position(arguments.flame_position, pipeline)
    output: Path = arguments.output_dir
    own = identity(arguments, pipeline, decoder, clips)
    claim(output, own)

    methods, generation = make_methods(arguments, folders, pipeline, decoder, clips, pairs)
    files = FeatureFiles(output / "scores", networks)
    num_pairs = {mode: len(pairs_of_mode) for mode, pairs_of_mode in by_mode(pairs).items()}
    results = {
        "format": FORMAT,
        "run": {"model_name": arguments.model, "dataset_name": arguments.dataset, **own},
        "modes": list(num_pairs),
        "num_pairs": num_pairs,
        "subjects": [clip.subject_id for clip in clips],
        "image": list(clips[0].size),
        "pairs": [describe(pair) for pair in pairs],
        "protocol": describe_protocol(vars(arguments)),
        "networks": describe_networks(networks),
        "versions": installed_versions(PACKAGES),
        "methods": score(methods, pairs, clips, files, arguments.seed),
    }
    avatar = GaussianAvatar.load(output / "avatars" / "ours" / pairs[0].source.subject_id, head=pipeline.head)
    results["speed"] = measure(avatar.to(arguments.device), pairs[0], generation, arguments.device)
    results = for_json(results)
    draw_grid(output / "grid.png", pairs, methods)
    progress = tqdm(pairs, desc="videos", unit="pair")
    videos = [save_pair_video(pair.path(output / "videos"), pair, methods) for pair in progress]
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
        raise FileNotFoundError(f"--flame_position {name}: {one_line(error)}") from None
    if decoder.config.mode != "flame_position":
        raise ValueError(f"--flame_position {name}: its mode is {decoder.config.mode!r}, expected 'flame_position'")
    return decoder


def identity(
    arguments: argparse.Namespace, pipeline: AvatarPipeline, decoder: GaussianDecoder | None, clips: Sequence[Clip]
) -> dict[str, Any]:
    """What determines a run's avatars and frames. Networks and compared folders may change: only scores depend on them."""
    networks = [pipeline.point_model, pipeline.gaussian_decoder]
    settings = [pipeline.tokenizer.to_dict(), *(network.config.to_dict() for network in networks)]
    names = ["mode", "seed", "batch_size", "candidates", "max_points", "max_points_per_face", "num_frames"]
    names += ["num_references"] * (arguments.num_references > 1)  # a folder from before does not have it
    return {
        "model": weights_digest(networks, settings, pipeline.head.hash),
        "flame_position": None if decoder is None else weights_digest([decoder], [decoder.config.to_dict()]),
        "dataset": digest(clips),
        "subjects": [clip.subject_id for clip in clips],
        "device": torch.device(arguments.device).type,
        **{name: getattr(arguments, name) for name in names},
    }


def score(
    methods: Sequence[Method], pairs: Sequence[Pair], clips: Sequence[Clip], files: FeatureFiles, seed: int
) -> dict[str, Any]:
    """Render and score every frame of every method: `results["methods"]`."""
    missing = missing_networks(files.networks)
    true = {clip.subject_id: files.of_clip(clip) for clip in tqdm(clips, desc="true frames", unit="clip")}
    rows: dict[str, dict[str, Any]] = {}
    for method in methods:
        rows[method.name] = {"about": method.about, "compared": method.compared}
        for mode, own in by_mode(pairs).items():
            if mode in method.absent:
                rows[method.name][mode] = {"absent": list(method.absent[mode])}
                continue
            progress = tqdm(own, desc=f"{method.name}, {mode}", unit="pair")
            features = [files.of_frames(method.name, pair, *method.drawn(pair)) for pair in progress]
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
