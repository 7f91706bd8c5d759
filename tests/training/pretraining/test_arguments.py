"""Arguments: the file, the command line over it, and what is said of a mistake."""

import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from paths import ROOT
from transformers import Dinov2Config, HfArgumentParser, TrainingArguments

from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer
from modeling import PointillistConfig
from training.common.arguments import flag_named, parse_arguments
from training.common.training_arguments import PretrainArguments
from training.decoder.arguments import DecoderArguments, DecoderTrainingArguments, FrameArguments, LossArguments
from training.fitting.arguments import FitArguments, FitSettings
from training.pretraining.arguments import DataArguments, ModelArguments

EVERY = sorted((ROOT / "training" / "configs").glob("*.yaml"))
CONFIGS = [path for path in EVERY if not path.stem.startswith(("decoder_", "fit_"))]
FIT_CONFIGS = [path for path in EVERY if path.stem.startswith("fit_")]
DECODER_CONFIGS = [path for path in EVERY if path.stem.startswith("decoder_")]
LAUNCHES = [ROOT / "accelerate_config.yaml", *sorted((ROOT / "training" / "configs" / "accelerate").glob("*.yaml"))]


SCRIPTS = {
    "pretrain": (ModelArguments, DataArguments, PretrainArguments),
    "decoder": (DecoderArguments, FrameArguments, LossArguments, DecoderTrainingArguments),
    "fit": (FitArguments, FitSettings),
}


def has(cls: type, name: str) -> bool:
    return any(field.name == name for field in fields(cls))


@pytest.fixture(autouse=True)
def number_of_threads():
    """Arguments set it for the process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def parse(*words):
    return parse_arguments(
        [str(word) for word in words], ModelArguments, DataArguments, PretrainArguments, description=""
    )


@pytest.fixture
def config(tmp_path):
    def write(text):
        (tmp_path / "run.yaml").write_text(text)
        return tmp_path / "run.yaml"

    return write


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(config):
    model, data, training = parse(
        config("corpus: a\nhidden_size: 96\nmax_steps: 7\n"), "--max_steps", 9, "--corpus", "b"
    )
    assert (model.hidden_size, training.max_steps, data.corpus) == (96, 9, "b")
    assert (model.num_hidden_layers, training.per_device_train_batch_size) == (24, 4)


@pytest.mark.parametrize("classes", SCRIPTS.values(), ids=SCRIPTS)
def test_values_are_those_of_transformers_parser(classes):
    required = {"corpus": "a", "point_model": "b", "head": "c", "data": "d", "output_dir": "e"}
    words = [f"--{name}={value}" for name, value in required.items() if any(has(cls, name) for cls in classes)]
    words += (
        ["--label_names", "x", "y", "--optim", "sgd", "--torch_compile", "false"] if has(classes[-1], "optim") else []
    )
    found, expected = (
        parse_arguments(words, *classes, description=""),
        HfArgumentParser(classes).parse_args_into_dataclasses(words),
    )
    for ours, theirs in zip(found, expected):
        # What Trainer sets up for itself compares by identity.
        names = [f.name for f in fields(ours) if f.name not in ("accelerator_config", "logging_dir")]
        assert {name: getattr(ours, name) for name in names} == {name: getattr(theirs, name) for name in names}


def test_without_a_file_the_defaults_are_the_papers():
    model, _, training = parse("--corpus", "a")
    assert (model.hidden_size, model.num_hidden_layers, model.num_attention_heads) == (1024, 24, 16)
    assert model.sliding_window == 12000
    assert (training.learning_rate, training.max_steps, training.per_device_train_batch_size) == (1e-4, 50_000, 4)
    assert training.report_to in ("none", [])


def test_flags_of_the_point_level_reach_the_configuration():
    words = ("--level", "point", "--mesh_aware_faces", "true", "--slot_order", "fyzx", "--slot_head", "attention")
    config = parse("--corpus", "a", *words)[0].config(GaussianTokenizer(n_bins=64, n_faces=600))
    assert (config.level, config.mesh_aware_faces) == ("point", True)
    assert (config.slot_order, config.slot_head, config.sliding_window) == ("fyzx", "attention", 3000)


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "'1e-4'"])
def test_numbers_are_numbers_however_yaml_reads_them(config, text):
    training = parse(config(f"corpus: a\nlearning_rate: {text}\nsave_steps: 5\nwarmup_steps: 3\n"))[2]
    assert training.learning_rate == 1e-4
    assert (training.save_steps, training.warmup_steps) == (5, 3)


def test_a_whole_number_where_a_fraction_is_meant_is_a_float(config):
    model, data, training = parse(config("corpus: a\nlearning_rate: 1\nrope_theta: 500\ncondition_dropout: 0\n"))
    for value in (training.learning_rate, model.rope_theta, data.condition_dropout):
        assert isinstance(value, float)


@pytest.mark.parametrize(("word", "value"), [("true", True), ("false", False), ("True", True), ("no", False)])
def test_a_flag_means_what_it_says_in_the_file_and_on_the_command_line(config, word, value):
    names = ("freeze_vision_encoder", "use_point_encoder")
    from_file = parse(config("corpus: a\n" + "".join(f"{name}: {word}\n" for name in names)))[0]
    from_line = parse("--corpus", "a", *(part for name in names for part in (f"--{name}", word)))[0]
    for model in (from_file, from_line):
        assert model.freeze_vision_encoder is value and model.use_point_encoder is value
    assert parse("--corpus", "a")[0].freeze_vision_encoder is None


def test_the_line_overrides_a_flag_of_the_file(config):
    model = parse(config("corpus: a\nuse_vision_encoder: true\n"), "--use_vision_encoder", "false")[0]
    assert model.use_vision_encoder is False


def test_a_null_in_the_file_is_none(config):
    assert parse(config("corpus: a\nmax_eval_avatars: null\nvision_model: null\n"))[1].max_eval_avatars is None


def test_an_unknown_field_is_refused_with_the_nearest_name(config):
    with pytest.raises(ValueError, match=r"run\.yaml: no field 'hiden_size'; did you mean 'hidden_size'\?"):
        parse(config("corpus: a\nhiden_size: 3\n"))
    with pytest.raises(ValueError, match=r"no field 'zzz'$"):
        parse(config("zzz: 3\n"))


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--hiden_size", "3", "--corpus", "a"], "--hiden_size"), ([], "--corpus"), (["--max_steps", "x"], "max_steps")],
)
def test_a_mistake_on_the_line_is_named(words, said, capsys):
    with pytest.raises((SystemExit, ValueError)) as caught:
        parse(*words)
    assert said in capsys.readouterr().err + str(caught.value)


def test_a_value_of_another_type_in_the_file_is_named(config, capsys):
    with pytest.raises((SystemExit, ValueError)) as caught:
        parse(config("corpus: a\nhidden_size: wide\n"))
    assert "hidden_size" in capsys.readouterr().err + str(caught.value)


def test_a_file_that_is_not_there_or_no_mapping_is_named(config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml: no such config file"):
        parse(tmp_path / "nowhere.yaml")
    with pytest.raises(ValueError, match=r"run\.yaml: expected fields and values, found list"):
        parse(config("- a\n- b\n"))
    with pytest.raises(ValueError, match=r"run\.yaml: not YAML"):
        parse(config("a: [1, 2\nb: }\n"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_parses_and_gives_a_valid_model(path, monkeypatch):
    # A pre-trained portrait encoder needs its configuration only, here of any size.
    monkeypatch.setattr(Dinov2Config, "from_pretrained", lambda name: Dinov2Config(hidden_size=384))
    # Precision is checked against the machine's devices, which is none of the file's business.
    settings = yaml.safe_load(path.read_text())
    words = ["--bf16", "false"] if settings.get("bf16") else []
    model, _, training = parse(path, "--corpus", "a", *words)
    tokenizer = GaussianTokenizer(n_bins=1024, n_faces=10144)
    config = model.config(tokenizer)
    config.validate_architecture()
    assert config.vocab_size == tokenizer.vocab_size
    assert config.hidden_size == settings["hidden_size"] and config.window_tokens == settings["sliding_window"]
    assert config.freeze_vision_encoder == bool(model.vision_model)
    assert training.max_steps == settings["max_steps"]


@pytest.mark.parametrize("path", FIT_CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_of_fits_parses_and_keeps_the_papers_limits(path):
    words = ["--data", "a", "--head", "procedural", "--output_dir", "b"]
    _, settings = parse_arguments([str(path), *words], FitArguments, FitSettings, description="test")
    assert settings.iterations == yaml.safe_load(path.read_text()).get("iterations", 600_000)
    assert (settings.limits.low, settings.limits.high) == (4, 15)


@pytest.mark.parametrize("path", DECODER_CONFIGS, ids=lambda path: path.stem)
def test_every_decoder_configuration_parses_and_gives_a_valid_decoder(path):
    settings = yaml.safe_load(path.read_text())
    words = ["--corpus", "a", "--point_model", "b", "--head", "procedural"]
    words += ["--bf16", "false"] if settings.get("bf16") else []
    classes = (DecoderArguments, FrameArguments, LossArguments, DecoderTrainingArguments)
    decoder, frames, losses, training = parse_arguments([str(path), *words], *classes, description="test")
    config = decoder.config(PointillistConfig(hidden_size=96), GaussianTokenizer(n_bins=1024, n_faces=10144))
    config.validate_architecture()
    assert config.point_feature_size == 96 and config.hidden_size == settings["hidden_size"]
    assert frames.num_targets == settings["num_targets"] and training.max_steps == settings["max_steps"]
    assert losses.lpips_weight == settings.get("lpips_weight", 0.1)


def test_the_papers_decoder_is_the_papers():
    settings = yaml.safe_load((ROOT / "training" / "configs" / "decoder_paper.yaml").read_text())
    expected = {"hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 16, "max_steps": 12_500}
    assert {name: settings[name] for name in expected} == expected


def test_the_paper_configuration_is_the_papers():
    settings = yaml.safe_load((ROOT / "training" / "configs" / "paper.yaml").read_text())
    expected = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "sliding_window": 12000}
    assert {name: settings[name] for name in expected} == expected
    assert settings["max_steps"] == 50_000 and settings["per_device_train_batch_size"] == 4


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_every_launch_configuration_is_one_of_accelerate(path):
    config = load_config_from_file(str(path))
    assert config.distributed_type.value in ("DEEPSPEED", "FSDP")
    if config.distributed_type.value == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] in (2, 3)
    # The command in the first line names files that exist.
    command = path.read_text().splitlines()[0].split()
    files = [word for word in command if word.endswith((".yaml", ".py"))]
    assert files and all((ROOT / file).is_file() for file in files)


def test_a_model_that_is_not_there_is_said_in_one_line_with_its_flag():
    with pytest.raises(FileNotFoundError) as caught, flag_named("--model", "some/repo"):
        raise OSError("We couldn't connect\nto anything")
    assert "--model some/repo" in str(caught.value) and "\n" not in str(caught.value)


def help_of(capsys, script, *words):
    with pytest.raises(SystemExit) as caught:
        parse_arguments([str(word) for word in words], *SCRIPTS[script], description="What it does.")
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_our_fields_in_titled_groups_and_each_has_an_explanation(capsys, script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    lines = help_of(capsys, script, "--help").splitlines()
    assert len(lines) < 160
    titles = [cls.__doc__.split("\n\n")[0] for cls in SCRIPTS[script]]
    assert [line for line in lines if line in titles] == titles
    names = [line.split()[0] for line in lines if line.startswith("  --")]
    assert len(names) == len(set(names)) and not [name for name in names if name.startswith("--no_")]
    for cls in SCRIPTS[script]:
        own = {field.name for field in fields(cls)} - {field.name for field in fields(TrainingArguments)}
        assert own <= {name.removeprefix("--") for name in names}
    text = "\n".join(lines)
    entries = [" ".join(entry.split()) for entry in text.split("\n  --")[1:]]
    assert not [entry for entry in entries if len(entry.split("(default")[0].split()) < 3]


def test_help_leaves_most_of_transformers_fields_to_help_all(capsys):
    short, long = (help_of(capsys, "pretrain", word) for word in ("--help", "--help_all"))
    assert "--help_all lists the other fields" in short and "--help_all lists" not in long
    for name in ("--learning_rate", "--resume_from_checkpoint", "--seed"):
        assert short.index("--hidden_size") < short.index("--corpus") < short.index(f"{name} ")
    missing = {field.name for field in fields(PretrainArguments) if field.init and f"--{field.name} " not in long}
    assert not missing
    assert "--adam_beta1 " in long and "--adam_beta1 " not in short
    assert long.index("--num_threads ") < long.index("--adam_beta1 ")


def test_help_tells_the_values_of_the_file_and_of_the_class(capsys, config):
    assert "(default: 12500)" in help_of(capsys, "decoder", "--help")
    said = help_of(capsys, "pretrain", config("corpus: a\nhidden_size: 96\n"), "--help")
    assert "width of the decoder (default: 96)" in said
    assert "--help_all" not in help_of(capsys, "fit", "--help")


def test_the_script_explains_itself():
    if shutil.which("accelerate", path=Path(sys.executable).parent) is None:
        pytest.skip("accelerate has no command here")
    printed = subprocess.run(
        [
            Path(sys.executable).parent / "accelerate",
            "launch",
            "--num_processes",
            "1",
            "training/pretrain.py",
            "--help",
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert printed.returncode == 0, printed.stderr[-2000:]
    for name in ("--corpus", "--hidden_size", "--sliding_window", "--learning_rate", "--resume_from_checkpoint"):
        assert name in printed.stdout
