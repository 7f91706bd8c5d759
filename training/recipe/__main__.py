"""Everything from nothing by one recipe: synthetic subjects -> corpus -> two trainings -> avatars of new subjects -> bench.

    pointillist train demo                                  # seven minutes on two CPU cores: what `make demo` runs
    pointillist train RECIPE.yaml --output_dir outputs/mine
    pointillist train demo --synthesize.num_subjects 100 --pretrain.max_steps 200

A recipe is a YAML file: a section for each command of the toolkit that runs, with that command's options, any of which can be
given again as `--section.option value`. Each command is printed before it runs. Then the models generate avatars of held-out
subjects, which `report.json` compares with the true ones and `images/` shows; `pipeline/` is a folder for
`AvatarPipeline.from_pretrained`. The last step is the reenactment bench on subjects of another seed: `bench/`.

Run again with the same folder, it keeps what is finished and resumes the training that was interrupted, exactly.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml

from gaussian_tokenizer.corpus.corpus import load_corpus
from gaussian_tokenizer.heads.loading import load_head
from gaussian_tokenizer.utils.atomic import atomic_file
from gaussian_tokenizer.utils.json_files import read_json
from training.common.arguments import CONFIGS, exit_on_user_error, find_config, nearest, read_yaml

SECTIONS = ("synthesize", "pretrain", "train_decoder", "bench")
OPTIONS = ("head", "seed", "processes", "num_generated")
RECIPES = CONFIGS / "recipes"
OWN = ("head", "corpus", "point_model", "output_dir")  # options of the commands that follow from the recipe's
STEPS = 5


def main() -> None:
    recipe, output = parse_arguments()
    begin = time.perf_counter()
    # Waiting threads sleep instead of spinning, which makes training several times faster on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_recipe(recipe, output)
    common = {"head": recipe["head"], "num_proc": os.cpu_count() or 1, "seed": recipe["seed"]}
    trained = {"head": recipe["head"], "seed": recipe["seed"], "resume_from_checkpoint": True}
    # No two augmented portraits are the same, nor the hidden states they give.
    cached = {} if augmented(recipe["train_decoder"]) else {"feature_cache": output / "features"}
    processes = str(recipe["processes"])
    launch = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", processes]

    run(1, "synthetic subjects, as a corpus", output / "corpus" / "corpus.json", [
        sys.executable, "-m", "gaussian_tokenizer.synthesize",
        *flags(common | recipe["synthesize"] | {"corpus": output / "corpus"}, switches=True),
    ])  # fmt: skip
    run(2, "training of the point model", output / "model" / "training_report.json", [
        *launch, "-m", "training.pretrain", *config_of(recipe["pretrain"]),
        *flags(trained | recipe["pretrain"] | {"corpus": output / "corpus", "output_dir": output / "model"}),
    ])  # fmt: skip
    run(3, "training of the Gaussian decoder", output / "decoder" / "training_report.json", [
        *launch, "-m", "training.train_gaussian_decoder", *config_of(recipe["train_decoder"]),
        *flags(trained | cached | recipe["train_decoder"] | {
            "point_model": output / "model", "corpus": output / "corpus", "output_dir": output / "decoder",
        }),
    ])  # fmt: skip
    announce(4, "avatars of held-out subjects, from portrait and head mesh")
    done = output / "report.json"
    if done.is_file():
        print(f"done before: {done}", flush=True)
    print(summary(read_json(done) if done.is_file() else evaluate(recipe, output), output))
    if recipe.get("bench"):
        subjects = common | recipe["bench"] | {"output_dir": output / "bench_subjects"}
        run(5, "reenactment bench: subjects of the bench", output / "bench" / "results.json", [
            sys.executable, "-m", "gaussian_tokenizer.synthesize", *flags(subjects, switches=True),
        ])  # fmt: skip
        run(5, "reenactment bench", output / "bench" / "results.json", [sys.executable, "-m", "eval.reenactment_bench", *flags({
            "model": output / "pipeline", "dataset": output / "bench_subjects", "output_dir": output / "bench",
            "max_points": 4 * recipe["bench"].get("num_points", 10**6),
        })])  # fmt: skip
    print(f"\nall of it: {(time.perf_counter() - begin) / 60:.1f} minutes")


def parse_arguments() -> tuple[dict[str, Any], Path]:
    """The recipe, with the options given on the command line, and the output folder."""
    names = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    parser = argparse.ArgumentParser(
        prog="pointillist train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s RECIPE [--output_dir DIR] [--section.option value ...]",
    )  # fmt: skip
    parser.add_argument("recipe", help=f"a YAML file, or a recipe of the toolkit: {names}")
    parser.add_argument("--output_dir", type=Path, help="default: outputs/ and the recipe's name")
    arguments, rest = parser.parse_known_args()
    path = Path(arguments.recipe)
    if not path.is_file():
        path = RECIPES / f"{arguments.recipe}.yaml"
        if not path.is_file():
            raise FileNotFoundError(f"{arguments.recipe}: no such recipe; give a YAML file, or a name of {names}")
    recipe = read_yaml(path)
    change(recipe, rest)
    check(recipe, str(path))
    return recipe, arguments.output_dir or Path("outputs") / path.stem


def change(recipe: dict[str, Any], words: list[str]) -> None:
    """Set what `--option value` and `--section.option value` say; values are YAML."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    for flag, value in zip_longest(words[::2], words[1::2]):
        section, _, name = flag.removeprefix("--").rpartition(".")
        if not flag.startswith("--") or (section and section not in SECTIONS):
            raise ValueError(f"{flag}: expected --option or --section.option{nearest(section, SECTIONS)}")
        if value is None:
            raise ValueError(f"{flag}: has no value")
        try:
            (recipe.setdefault(section, {}) if section else recipe)[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"{flag} {value}: not a value") from None


def check(recipe: dict[str, Any], where: str) -> None:
    """Raise `ValueError` for what no command would take, before the first of them runs for minutes."""
    for name, value in {"processes": 1, "seed": 0, "num_generated": 16}.items():
        recipe.setdefault(name, value)
    for name in recipe:
        if name not in SECTIONS + OPTIONS:
            raise ValueError(f"{where}: no section or option {name!r}{nearest(name, SECTIONS + OPTIONS)}")
    for name in ("head", *SECTIONS[:3]):
        if name not in recipe:
            raise ValueError(f"{where}: lacks {name}; a recipe has head, {', '.join(SECTIONS[:3])} and may have bench")
    for name in SECTIONS:
        if not isinstance(recipe.get(name), dict | None if name == "bench" else dict):
            raise ValueError(f"{where}: {name} is {recipe[name]!r}, expected options and their values")
    for name in ("processes", "num_generated"):
        if not isinstance(recipe[name], int) or recipe[name] < 1:
            raise ValueError(f"{where}: {name} is {recipe[name]!r}, expected a number from 1 on")
    from gaussian_tokenizer.synthesize import options_parser
    from training.common.training_arguments import PretrainArguments
    from training.decoder.arguments import DecoderArguments, DecoderTrainingArguments, FrameArguments, LossArguments
    from training.pretraining.arguments import DataArguments, ModelArguments

    classes = {
        "pretrain": (ModelArguments, DataArguments, PretrainArguments),
        "train_decoder": (DecoderArguments, FrameArguments, LossArguments, DecoderTrainingArguments),
    }
    of_subjects = [action.dest for action in options_parser()._actions]
    known = {"synthesize": of_subjects, "bench": of_subjects}
    for section, of in classes.items():
        known[section] = ["config", *(field.name for cls in of for field in fields(cls) if field.init)]
    for section, names in known.items():
        for name in recipe.get(section) or ():
            if name not in names:
                raise ValueError(f"{where}: {section} has no option {name!r}{nearest(name, names)}")
            if name in OWN:
                raise ValueError(
                    f"{where}: {section} has {name}, which the recipe sets; give --head and --output_dir without a section"
                )
    for section in ("synthesize", "bench"):
        if recipe.get(section) and "num_subjects" not in recipe[section]:
            raise ValueError(f"{where}: {section} lacks num_subjects")
    if recipe.get("bench"):
        seeds = [recipe[section].get("seed", recipe["seed"]) for section in ("synthesize", "bench")]
        if seeds[0] == seeds[1]:
            raise ValueError(
                f"{where}: seed {seeds[0]} makes the subjects of synthesize and those of bench, which training must not have "
                "seen; give bench another seed"
            )


def keep_recipe(recipe: dict[str, Any], output: Path) -> None:
    """Write the recipe into the output folder, or compare it with the one that is there."""
    output.mkdir(parents=True, exist_ok=True)
    kept = output / "recipe.yaml"
    if kept.is_file() and read_yaml(kept) != recipe:
        raise ValueError(
            f"{output}: begun with another recipe, see {kept}; remove the folder, or give another --output_dir"
        )
    with atomic_file(kept) as file:
        file.write(yaml.safe_dump(recipe, sort_keys=False).encode())


def config_of(section: dict[str, Any]) -> list[str]:
    """The config that a section of a training names, which its other options change."""
    return [section["config"]] if "config" in section else []


def augmented(section: dict[str, Any]) -> bool:
    """Whether a training augments portraits, by its section or the config that this names."""
    config = read_yaml(find_config(section["config"])) if "config" in section else {}
    return bool((config | section).get("augment_portraits"))


def flags(options: dict[str, Any], switches: bool = False) -> list[str]:
    """Words of a command line. None leaves an option out; with `switches`, one that is true or false takes no value."""
    words = []
    for name, value in options.items():
        if name == "config" or value is None or (switches and value is False):
            continue
        words += [f"--{name}"] if switches and value is True else [f"--{name}", str(value)]
    return words


def announce(number: int, title: str) -> None:
    print(f"\n=== {number}/{STEPS} {title}", flush=True)


def run(number: int, title: str, result: Path, command: list[str]) -> None:
    """Run a command of the toolkit, its output passing through, unless its `result` is there."""
    announce(number, title)
    if result.is_file():
        print(f"done before: {result}", flush=True)
        return
    shown = {command[0]: Path(command[0]).name, sys.executable: "python"}
    print("$", shlex.join([shown.get(part, part) for part in command]), flush=True)
    if subprocess.run(command).returncode:
        sys.exit(f"error: the step {title!r} failed; its message is above")


def evaluate(recipe: dict[str, Any], output: Path) -> dict[str, Any]:
    """Generate avatars, save the pipeline; returns the content of `report.json`."""
    from modeling import AvatarPipeline, GaussianDecoder, PointillistForCausalLM
    from training.common.model_card import hub_license
    from training.recipe.evaluation import generate

    begin = time.perf_counter()
    corpus = load_corpus(output / "corpus")
    pipeline = AvatarPipeline(
        corpus.tokenizer,
        PointillistForCausalLM.from_pretrained(output / "model"),
        GaussianDecoder.from_pretrained(output / "decoder"),
        load_head(recipe["head"]),
    )
    report = read_json(output / "model" / "training_report.json")
    report["decoder"] = read_json(output / "decoder" / "training_report.json")
    report |= generate(pipeline, corpus, recipe["num_generated"], recipe["seed"], output)
    images = [output / "images" / "avatars.png"]
    pipeline.save_pretrained(output / "pipeline", images=images, license=hub_license(corpus))
    report["seconds"] = round(time.perf_counter() - begin, 1)
    with atomic_file(output / "report.json") as file:
        file.write(json.dumps(report, indent=2).encode())
    return report


def summary(report: dict[str, Any], output: Path) -> str:
    own, others = report["mean_chamfer_own"] * 1000, report["mean_chamfer_others"] * 1000
    return (
        f"\npoints: held-out NLL {report['heldout_nll']:.3f} nats per token, with another subject's portrait and mesh "
        f"{report['heldout_nll_other_condition']:.3f} (unigram {report['unigram_nll']:.3f}, uniform "
        f"{report['uniform_nll']:.3f}); invalid tokens {sum(g['invalid_tokens'] for g in report['generated'])}; mean chamfer "
        f"distance to the same subject {own:.2f} mm, to the others {others:.2f} mm\n"
        f"images: PSNR {report['psnr_heldout']:.2f} dB from the portrait, {report['psnr_reencoded']:.2f} dB on the true points, "
        f"mean image {report['psnr_mean_image']:.2f} dB\n"
        f"see {output / 'images' / 'avatars.png'}, motion.gif and generated.png; all results are in {output / 'report.json'}"
    )


if __name__ == "__main__":
    exit_on_user_error(main)
