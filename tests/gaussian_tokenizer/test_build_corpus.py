"""Building corpora: the same bytes whatever happens on the way, and one clear line where it cannot be done."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image

from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.build_corpus import main
from gaussian_tokenizer.captures.frame import Frame
from gaussian_tokenizer.captures.subject import Subject, write_subject
from gaussian_tokenizer.corpus.building import build
from gaussian_tokenizer.corpus.corpus import load_corpus, staging_folder, tokenizer_fingerprint
from gaussian_tokenizer.corpus.options import BuildSettings
from gaussian_tokenizer.corpus.validation import validate
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.heads.procedural_head import build_procedural_head
from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer

HEAD = build_procedural_head(600)
SETTINGS = BuildSettings(num_validation=3, shard_size=12_000)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets_cache")


def make_subject(folder, seed, count=50, frames=2, **metadata):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator) * 0.3

    params = replace(HeadParameters.zeros(HEAD.n_shape, HEAD.n_expression), shape=normal(HEAD.n_shape))
    faces = torch.randint(0, HEAD.n_faces, (count,), generator=generator)
    tensors = {"sh": normal(count, 1, 3), "opacities": normal(count), "scales": normal(count, 3)}
    avatar = GaussianAvatar(normal(count, 3), faces, quats=normal(count, 4), params=params, **tensors).with_head(HEAD)
    viewmat = np.diag([1.0, -1.0, -1.0, 1.0])
    viewmat[2, 3] = 1.0
    images = [np.full((6, 8, 3), (10 * seed + camera) % 256, dtype=np.uint8) for camera in range(frames)]
    shots = [Frame(0, c, viewmat, 20.0, 20.0, 4.0, 3.0, 8, 6, image, params) for c, image in enumerate(images)]
    write_subject(folder, avatar, shots, {"license": "CC0-1.0", "consent": "signed", **metadata})


def make_subjects(folder, count):
    for seed in range(count):
        make_subject(folder / f"s{seed}", seed)
    return folder


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    return make_subjects(tmp_path_factory.mktemp("subjects"), 10)


@pytest.fixture(scope="module")
def expected(subjects, tmp_path_factory):
    """File name -> bytes of the corpus of `subjects`, built in one go by one process."""
    output = tmp_path_factory.mktemp("reference") / "corpus"
    build(subjects, HEAD, output, SETTINGS, progress=False)
    return contents(output)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def command(subjects, output, *more):
    head = output.parent / "head.safetensors"
    if not head.exists():
        HEAD.save(head)
    options = [
        "--avatars",
        subjects,
        "--head",
        head,
        "--output_dir",
        output,
        "--num_validation",
        3,
        "--shard_size",
        12_000,
    ]
    return [str(word) for word in (*options, *more)]


def start(arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    words = [sys.executable, "-m", "gaussian_tokenizer.build_corpus", *arguments]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# ---- the same bytes


def test_two_processes_make_the_bytes_of_one(subjects, tmp_path, expected):
    build(subjects, HEAD, tmp_path / "corpus", SETTINGS, num_proc=2, progress=False)
    assert contents(tmp_path / "corpus") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_the_number_of_torch_threads_does_not_matter_and_is_left_alone(subjects, tmp_path, expected):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        build(subjects, HEAD, tmp_path / "corpus", SETTINGS, progress=False)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert contents(tmp_path / "corpus") == expected


def test_a_build_killed_at_random_moments_ends_with_the_same_bytes(subjects, tmp_path, expected):
    output = tmp_path / "corpus"
    staging = staging_folder(output)
    # From a server without threads: a fork of this process would inherit locks that nobody gives back.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gaussian_tokenizer.corpus.building"])
    rng = random.Random(0)
    num_shards = sum(name.endswith(".parquet") for name in expected)
    found = set()
    for _ in range(20):
        process = context.Process(target=build, args=(subjects, HEAD, output, SETTINGS), kwargs={"progress": False})
        process.start()
        # Wait for a random part of the work, then a random moment more.
        wanted, deadline = rng.randrange(num_shards), time.monotonic() + 5
        while len(list(staging.glob("done/*.json"))) < wanted and not output.exists() and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(rng.random() * 0.01)
        process.kill()
        process.join()
        found.add(len(list(staging.glob("done/*.json"))))
        if output.exists():
            break
        with pytest.raises(FileNotFoundError, match=r"half-built; run build_corpus again|no such corpus folder"):
            load_corpus(output)
    assert len(found) > 2  # it was really killed at different stages
    if not output.exists():
        build(subjects, HEAD, output, SETTINGS, progress=False)
        assert not staging.exists()
    assert contents(output) == expected


@pytest.mark.distributed
def test_a_killed_command_leaves_no_process_behind_and_is_continued(subjects, tmp_path, expected):
    output = tmp_path / "corpus"
    staging = staging_folder(output)
    command_process = start(command(subjects, output, "--num_proc", 2))
    deadline = time.monotonic() + 120
    while command_process.poll() is None and not list(staging.glob("done/*.json")) and time.monotonic() < deadline:
        time.sleep(0.002)
    family = descendants(command_process.pid)
    command_process.send_signal(signal.SIGKILL)
    command_process.communicate(timeout=30)
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{process}").exists() for process in family) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [process for process in family if Path(f"/proc/{process}").exists()]
    if not output.exists():
        assert main(command(subjects, output)) == 0
        assert not staging.exists()
    assert contents(output) == expected


def descendants(process):
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [int(child) for child in children] + [p for child in children for p in descendants(int(child))]


def test_finished_shards_are_kept_and_damaged_ones_are_written_again(subjects, tmp_path, expected, monkeypatch):
    output = tmp_path / "corpus"
    fail_after(monkeypatch, 3)
    with pytest.raises(OSError, match="No space left"):
        build(subjects, HEAD, output, SETTINGS, progress=False)
    monkeypatch.undo()
    shards = sorted(staging_folder(output).glob("corpus/*/*.parquet"))
    assert len(shards) == 3 and not output.exists()
    kept, damaged, _ = shards
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    os.link(kept, tmp_path / "kept")
    for name in (".README.md.00ff.tmp", "avatars/.train.tmp", "tokenizer/.processor_config.json.x"):  # of killed builds
        (staging_folder(output) / "corpus" / name).parent.mkdir(exist_ok=True)
        (staging_folder(output) / "corpus" / name).write_text("half")
    build(subjects, HEAD, output, SETTINGS, progress=False)
    assert contents(output) == expected
    assert (tmp_path / "kept").samefile(output / "avatars" / kept.name)


def fail_after(monkeypatch, count):
    from gaussian_tokenizer.corpus import building

    real, calls = building.write_shard, []

    def write(*arguments):
        calls.append(1)
        if len(calls) > count:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(building, "write_shard", write)


def test_subjects_that_change_between_two_attempts_are_read_anew(tmp_path, monkeypatch):
    folder = make_subjects(tmp_path / "subjects", 6)
    settings = replace(
        SETTINGS, bounds="default"
    )  # fitted ones would change with the subject, and all shards with them
    fail_after(monkeypatch, 5)
    with pytest.raises(OSError, match="No space"):
        build(folder, HEAD, tmp_path / "corpus", settings, progress=False)
    monkeypatch.undo()
    for seed in range(6):
        make_subject(folder / f"s{seed}", seed, license="MIT")
    build(folder, HEAD, tmp_path / "corpus", settings, progress=False)
    build(folder, HEAD, tmp_path / "afresh", settings, progress=False)
    assert contents(tmp_path / "corpus") == contents(tmp_path / "afresh")


def test_a_half_built_corpus_of_other_settings_is_not_continued(subjects, tmp_path, monkeypatch, expected):
    fail_after(monkeypatch, 2)
    with pytest.raises(OSError):
        build(subjects, HEAD, tmp_path / "corpus", replace(SETTINGS, n_bins=128), progress=False)
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match=r"half-built corpus of other settings: n_bins 128 \(now 1024\); .*--overwrite"
    ):
        build(subjects, HEAD, tmp_path / "corpus", SETTINGS, progress=False)
    build(subjects, HEAD, tmp_path / "corpus", SETTINGS, overwrite=True, progress=False)
    assert contents(tmp_path / "corpus") == expected


# ---- splits, bounds, tokenizer


def test_the_split_is_by_subject_exact_and_stable(subjects, tmp_path):
    def split(name, **changes):
        build(subjects, HEAD, tmp_path / name, replace(SETTINGS, **changes), progress=False)
        corpus = load_corpus(tmp_path / name)
        return {part: {row["avatar_id"] for row in corpus.avatars(part)} for part in corpus.splits}

    parts = split("a", num_test=2)
    assert {part: len(ids) for part, ids in parts.items()} == {"train": 5, "validation": 3, "test": 2}
    assert len(set.union(*parts.values())) == 10
    assert split("b", num_test=2, n_bins=64) == parts
    assert split("c", num_test=2, seed=1) != parts
    assert {part: len(ids) for part, ids in split("d", num_validation=None).items()} == {"train": 9, "validation": 1}
    assert list(split("e", num_validation=0)) == ["train"]
    with pytest.raises(ValueError, match="10 validation and 0 test subjects of 10 leave none to train on"):
        split("f", num_validation=10)


def test_bounds_are_fitted_to_all_points_or_taken_as_given(subjects, tmp_path):
    positions = np.concatenate(
        [Subject.open(path).load_avatar(HEAD).canonical_points()["positions"] for path in sorted(subjects.iterdir())]
    )
    build(subjects, HEAD, tmp_path / "fit", SETTINGS, progress=False)
    (lo, hi) = np.array(load_corpus(tmp_path / "fit").tokenizer.bounds)
    room = 0.05 * (positions.max(0) - positions.min(0)).max()
    np.testing.assert_allclose(lo, positions.min(0) - room, atol=1e-6)
    np.testing.assert_allclose(hi, positions.max(0) + room, atol=1e-6)
    given = [[-0.05] * 3, [0.05] * 3]
    manifest = build(subjects, HEAD, tmp_path / "given", replace(SETTINGS, bounds=given), progress=False)
    corpus = load_corpus(tmp_path / "given")
    assert corpus.tokenizer.bounds == given
    outside = sum(counts["num_out_of_bounds"] for counts in manifest["splits"].values())
    assert outside == (np.abs(positions.astype(np.float64)) > 0.05).any(axis=1).sum() > 0


def test_a_given_tokenizer_is_used_as_it_is_and_must_fit_the_head(subjects, tmp_path):
    tokenizer = GaussianTokenizer(n_bins=100, n_faces=HEAD.n_faces, axis_order="xyz")
    build(subjects, HEAD, tmp_path / "corpus", SETTINGS, tokenizer=tokenizer, progress=False)
    found = load_corpus(tmp_path / "corpus", tokenizer).tokenizer
    assert tokenizer_fingerprint(found) == tokenizer_fingerprint(tokenizer)
    assert all(verdict.problems == [] for verdict in validate(tmp_path / "corpus"))
    with pytest.raises(ValueError, match=r"the tokenizer is of 7 faces, head model .* has 600"):
        build(subjects, HEAD, tmp_path / "b", SETTINGS, GaussianTokenizer(n_faces=7), progress=False)
    other = GaussianTokenizer(n_faces=HEAD.n_faces, head_name="another", head_hash="0" * 16)
    with pytest.raises(ValueError, match=r"the tokenizer is of head model 'another' \(hash 0000"):
        build(subjects, HEAD, tmp_path / "b", SETTINGS, other, progress=False)
    short = GaussianTokenizer(n_faces=HEAD.n_faces, max_points=20)
    with pytest.raises(ValueError, match=r"s0: 50 points, the tokenizer's max_points is 20"):
        build(subjects, HEAD, tmp_path / "b", SETTINGS, short, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus"]


# ---- what cannot be built


def spoil(folder):
    """A folder of three good subjects and one of each kind that cannot be used."""
    make_subjects(folder, 3)
    for seed, name in enumerate(["cut", "head", "image", "twin", "metadata", "size"], start=20):
        make_subject(folder / name, seed, avatar_id="same" if name == "twin" else name)
    make_subject(folder / "twin2", 30, avatar_id="same")
    ply = folder / "cut" / "point_cloud.ply"
    ply.write_bytes(ply.read_bytes()[:-20])
    metadata = json.loads((folder / "head" / "metadata.json").read_text()) | {"head_hash": "f" * 16}
    (folder / "head" / "metadata.json").write_text(json.dumps(metadata))
    image = folder / "image" / "images" / "00000_01.png"
    image.write_bytes(image.read_bytes()[:-20])
    (folder / "metadata" / "metadata.json").write_text("{")
    Image.new("RGB", (3, 3)).save(folder / "size" / "images" / "00000_00.png")
    (folder / "bare").mkdir()
    (folder / "bare" / "metadata.json").write_text("{}")
    empty = ply.read_bytes().split(b"end_header\n")[0].replace(b"element vertex 50", b"element vertex 0")
    (folder / "empty").mkdir()
    (folder / "empty" / "point_cloud.ply").write_bytes(empty + b"end_header\n")
    return folder


REASONS = {
    "bare": "holds neither point_cloud.ply",
    "cut": "point_cloud.ply: ",
    "empty": "the file holds no Gaussians",
    "head": "made on head model",
    "metadata": "metadata.json: not JSON",
    "image": "00000_01.png: damaged image",
    "size": "00000_00.png has 3x3 pixels, expected 8x6",
    "twin": "has the avatar_id 'same', like twin2",
    "twin2": "has the avatar_id 'same', like twin",
}


@pytest.mark.parametrize("num_proc", [1, 2])
def test_every_bad_subject_is_listed_with_its_reason_and_nothing_is_written(tmp_path, num_proc):
    folder = spoil(tmp_path / "subjects")
    with pytest.raises(ValueError) as error:
        build(folder, HEAD, tmp_path / "corpus", replace(SETTINGS, num_validation=1), num_proc=num_proc, progress=False)
    first, *lines = str(error.value).splitlines()
    assert "9 of 12 subjects" in first and "--skip_bad" in first
    found = dict(line.strip().split(": ", 1) for line in lines)
    assert found.keys() == REASONS.keys()
    assert [name for name in REASONS if REASONS[name] not in found[name]] == [], found
    assert str(tmp_path) not in "".join(found.values())
    assert [path.name for path in tmp_path.iterdir()] == ["subjects"]


def test_bad_subjects_can_be_left_out_and_are_recorded(tmp_path):
    folder = spoil(tmp_path / "subjects")
    manifest = build(
        folder, HEAD, tmp_path / "corpus", replace(SETTINGS, num_validation=1, skip_bad=True), progress=False
    )
    assert [entry["folder"] for entry in manifest["skipped"]] == sorted(REASONS)
    assert "damaged image" in (tmp_path / "corpus" / "README.md").read_text()
    assert sum(counts["subjects"] for counts in load_corpus(tmp_path / "corpus").manifest["splits"].values()) == 3


def without_consent(folder):
    """Nine subjects, seven of which do not say their license, their consent or either."""
    make_subjects(folder, 2)
    for seed in range(2, 9):
        lacking = {0: {"license": ""}, 1: {"consent": None}, 2: {"license": "Unknown", "consent": " "}}[seed % 3]
        make_subject(folder / f"s{seed}", seed, **lacking)
    return folder


def test_subjects_without_license_or_consent_are_refused_and_some_of_them_named(tmp_path):
    folder = without_consent(tmp_path / "subjects")
    with pytest.raises(ValueError) as error:
        build(folder, HEAD, tmp_path / "corpus", SETTINGS, progress=False)
    assert "7 of 9 subjects" in str(error.value) and "--allow_unknown_license" in str(error.value)
    assert "7 without license or consent in metadata.json: s2, s3, s4, s5, s6 and 2 more;" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["subjects"]


def test_subjects_without_license_are_let_in_on_demand_and_the_card_names_them(tmp_path):
    folder = without_consent(tmp_path / "subjects")
    assert main(command(folder, tmp_path / "corpus", "--allow_unknown_license")) == 0
    card = (tmp_path / "corpus" / "README.md").read_text()
    assert "For 7 subjects it is not known" in card and "s2, s3, s4, s5, s6, s7, s8. Find out" in card
    rows = [row for split in ("train", "validation") for row in load_corpus(tmp_path / "corpus").avatars(split)]
    found = {row["avatar_id"]: (row["license"], row["consent"]) for row in rows}
    assert (found["s0"], found["s2"]) == (("CC0-1.0", "signed"), ("unknown", "unknown"))
    assert (found["s3"], found["s4"]) == (("unknown", "signed"), ("CC0-1.0", "unknown"))


@pytest.mark.parametrize(
    "said", [{"consent": False}, {"consent": "No"}, {"license": False}, {"license": "false"}], ids=str
)
def test_a_subject_that_says_no_is_not_used_whatever_is_allowed(tmp_path, said):
    folder = make_subjects(tmp_path / "subjects", 4)
    make_subject(folder / "s3", 3, **said)
    for settings in (SETTINGS, replace(SETTINGS, allow_unknown_license=True)):
        with pytest.raises(
            ValueError, match=r"s3: (consent|license) in metadata.json is .*: the subject may not be used"
        ):
            build(folder, HEAD, tmp_path / "corpus", settings, progress=False)


@pytest.mark.parametrize("said", [{"consent": []}, {"consent": 1}, {"license": {"a": 1}}, {"license": True}], ids=str)
def test_only_words_say_license_and_consent(tmp_path, said):
    folder = make_subjects(tmp_path / "subjects", 4)
    make_subject(folder / "s3", 3, **said)
    [name] = said
    assert getattr(Subject.open(folder / "s3").about, name) == "unknown"
    with pytest.raises(
        ValueError, match=r"1 without license or consent in metadata.json: s3; .*--allow_unknown_license"
    ):
        build(folder, HEAD, tmp_path / "corpus", replace(SETTINGS, num_validation=1), progress=False)
    settings = replace(SETTINGS, num_validation=1, allow_unknown_license=True)
    build(folder, HEAD, tmp_path / "corpus", settings, progress=False)
    rows = [row for split in ("train", "validation") for row in load_corpus(tmp_path / "corpus").avatars(split)]
    assert {row["avatar_id"]: row[name] for row in rows}["s3"] == "unknown"


def test_subjects_without_license_can_be_left_out(tmp_path):
    folder = without_consent(tmp_path / "subjects")
    settings = replace(SETTINGS, num_validation=1, skip_bad=True)
    manifest = build(folder, HEAD, tmp_path / "corpus", settings, progress=False)
    assert {entry["folder"]: entry["reason"] for entry in manifest["skipped"]}["s3"] == "license unknown"
    assert len(manifest["skipped"]) == 7


def test_subjects_without_images_make_a_corpus_without_frames(tmp_path):
    for seed in range(3):
        make_subject(tmp_path / "subjects" / f"s{seed}", seed, frames=0)
    build(tmp_path / "subjects", HEAD, tmp_path / "corpus", replace(SETTINGS, num_validation=1), progress=False)
    corpus = load_corpus(tmp_path / "corpus")
    assert len(corpus.avatars()) == 2 and set(corpus.frame_rows().values()) == {range(0)}
    with pytest.raises(ValueError, match="no frames of the split 'train'"):
        corpus.frames()
    assert len(load_dataset(str(tmp_path / "corpus"))["validation"]) == 1


# ---- the command


def test_the_command_builds_counts_and_checks(subjects, tmp_path, capsys):
    output = tmp_path / "corpus"
    assert main(command(subjects, output)) == 0
    assert "train: 7 subjects, 14 frames, 350 points, 1,414 tokens, 0 points out of bounds" in capsys.readouterr().out
    assert main(["stats", str(output), "--plot", str(tmp_path / "h.png")]) == 0
    assert "points per subject       min 50, median 50, max 50" in capsys.readouterr().out
    assert Image.open(tmp_path / "h.png").format == "PNG"
    assert main(["validate", str(output)]) == 0
    assert "complete and consistent" in capsys.readouterr().out
    shard = next(output.glob("frames/*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert main(["validate", str(output)]) == 1
    assert f"bad  frames/{shard.name}" in capsys.readouterr().out
    assert main(["stats", str(output)]) == 1
    assert str(shard) in capsys.readouterr().err


def test_the_command_says_in_one_line_why_not(subjects, tmp_path, capsys):
    output = tmp_path / "corpus"
    output.mkdir()
    (output / "thesis.txt").write_text("precious")
    assert main(command(subjects, output)) == 1
    assert capsys.readouterr().err.endswith(
        "exists already; choose another --output_dir, or --overwrite to replace it\n"
    )
    assert (output / "thesis.txt").read_text() == "precious"
    (tmp_path / "nothing").mkdir()
    assert main(command(tmp_path / "nothing", tmp_path / "b")) == 1
    assert "no avatars in its 0 folders; expected <avatar_id>/point_cloud.ply" in capsys.readouterr().err
    assert main(["stats", str(tmp_path / "absent")]) == 1
    assert "no such corpus folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(command(subjects, tmp_path / "b", "--bounds", "1,2,3"))
    assert "is not fit, default or six numbers" in capsys.readouterr().err


def test_two_builds_of_one_corpus_at_a_time_are_refused(subjects, tmp_path):
    import fcntl

    staging = staging_folder(tmp_path / "corpus")
    staging.mkdir()
    with open(staging / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is building this corpus"):
            build(subjects, HEAD, tmp_path / "corpus", SETTINGS, progress=False)


def test_a_failed_upload_is_one_line_and_the_corpus_stays(subjects, tmp_path, capsys, monkeypatch):
    import huggingface_hub

    def offline(*arguments, **keywords):
        raise ConnectionError("network is\n unreachable")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", offline)
    assert main(command(subjects, tmp_path / "corpus", "--push_to_hub", "me/heads")) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "was not uploaded to 'me/heads': network is unreachable" in line
    assert load_corpus(tmp_path / "corpus").splits == ("train", "validation")


def test_help_names_options_and_commands(capsys):
    for words, names in (
        (["--help"], ("--num_proc", "validate CORPUS")),
        (["stats", "--help"], ("--page", "--plot")),
    ):
        with pytest.raises(SystemExit):
            main(words)
        output = capsys.readouterr().out
        assert all(name in output for name in names)
