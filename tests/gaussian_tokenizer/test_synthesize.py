"""The command that writes synthetic subjects: what it writes can be read, and running it again is safe."""

import hashlib
import itertools
import multiprocessing
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.captures.subject import find_subjects
from gaussian_tokenizer.corpus.building import build
from gaussian_tokenizer.corpus.corpus import staging_folder
from gaussian_tokenizer.corpus.options import BuildSettings
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.loading import load_head
from gaussian_tokenizer.rendering.cameras import portrait_cameras
from gaussian_tokenizer.synthesize import LOCK_NAME, main, synthesize
from gaussian_tokenizer.synthetic.source import PLAIN, SyntheticSettings, SyntheticSource
from gaussian_tokenizer.synthetic.subject import synthesize_subject
from gaussian_tokenizer.utils.locks import exclusive

HEAD = "procedural:600"


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("subjects")
    synthesize(folder, 3, HEAD, image_size=32, views=3, timesteps=2, seed=5, **PLAIN)
    return folder


@pytest.fixture(scope="module")
def head() -> HeadModel:
    return load_head(HEAD)


def test_what_is_written_reads_as_the_same_avatars(written, head):
    subjects = find_subjects(written)
    assert [subject.avatar_id for subject in subjects] == [f"synthetic-5-{index:06d}" for index in range(3)]
    for index, subject in enumerate(subjects):
        expected = synthesize_subject(head, (5, index)).avatar
        avatar = GaussianAvatar.load(subject.path, head)
        for name, tensor in expected.tensors().items():
            assert torch.equal(avatar.tensors()[name], tensor), name
        assert torch.equal(avatar.params.shape, expected.params.shape)
        assert subject.about.license == "CC0-1.0"
        assert subject.about.consent == "synthetic, no person"
        assert subject.metadata["head_hash"] == head.hash


def test_frames_hold_images_of_every_timestep_from_every_camera(written, head):
    subject = find_subjects(written)[1]
    frames = subject.frames()
    assert [(frame.timestep, frame.camera) for frame in frames] == [(t, c) for t in (0, 1) for c in (0, 1, 2)]
    cameras = portrait_cameras(head, 32, (0, 30, -30))
    shape = subject.load_avatar(head).params.shape
    for frame in frames:
        np.testing.assert_allclose(frame.viewmat, cameras.viewmats[frame.camera], atol=1e-6)
        np.testing.assert_allclose(frame.K, cameras.Ks[frame.camera], rtol=1e-6)
        params = frame.load_params()
        assert torch.equal(params.shape, shape)
        assert bool(params.expr.any()) == bool(params.neck_pose.any()) == (frame.timestep == 1)
        image = np.asarray(Image.open(frame.image))
        assert image.shape == (32, 32, 4)
        assert image[10:20, 12:20, 3].min() > 200 and image[..., :3][image[..., 3] > 250].min() < 200  # a head
        assert image[0, 0, 3] == 0  # and nothing around it
    assert not np.array_equal(*(np.asarray(Image.open(frame.image)) for frame in (frames[0], frames[3])))


@pytest.mark.distributed
def test_the_number_of_processes_changes_no_byte(written, tmp_path):
    synthesize(tmp_path / "two", 3, HEAD, num_proc=2, image_size=32, views=3, timesteps=2, seed=5, **PLAIN)
    assert hashes(tmp_path / "two") == hashes(written)


def test_a_second_run_keeps_what_is_finished_and_makes_the_rest(written, tmp_path):
    folder = tmp_path / "subjects"
    shutil.copytree(written, folder)
    shutil.rmtree(folder / "synthetic-5-000001")
    (folder / ".synthetic-5-000001.00ff00ff00ff.tmp").mkdir()  # of a run that was killed
    kept = (folder / "synthetic-5-000000" / "point_cloud.ply").stat()
    synthesize(folder, 3, HEAD, image_size=32, views=3, timesteps=2, seed=5, **PLAIN)
    assert (folder / "synthetic-5-000000" / "point_cloud.ply").stat() == kept
    assert hashes(folder) == hashes(written)
    assert not list(folder.glob(".*"))


def test_a_folder_of_another_recipe_is_refused_before_anything_is_written(written):
    before = hashes(written)
    for changed in (
        {"image_size": 48},
        {"views": 1},
        {"timesteps": 1},
        {"num_points": 300},
        {"placement": "regular"},
        {"look": "varied"},
        {"cameras": "random"},
        {"head": "procedural:700"},
    ):
        arguments = {"head": HEAD, "image_size": 32, "views": 3, "timesteps": 2, "seed": 5} | PLAIN | changed
        with pytest.raises(ValueError, match=r"synthetic-5-000000.*choose another output folder"):
            synthesize(written, 4, **arguments)
    assert hashes(written) == before


def test_a_second_run_at_a_time_is_refused_and_takes_nothing_of_the_first_for_a_leftover(tmp_path):
    growing = tmp_path / ".synthetic-0-000000.00ff.tmp"
    growing.mkdir()
    with exclusive(tmp_path / LOCK_NAME):
        with pytest.raises(ValueError, match="another process is making subjects in it; wait for it to end"):
            synthesize(tmp_path, 1, HEAD, image_size=16)
        assert growing.exists()
    synthesize(tmp_path, 1, HEAD, image_size=16)
    assert [path.name for path in tmp_path.iterdir()] == ["synthetic-0-000000"]


def test_a_folder_that_is_no_synthetic_subject_is_left_alone(tmp_path):
    (tmp_path / "synthetic-0-000000").mkdir()
    (tmp_path / "synthetic-0-000000" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="no synthetic subject"):
        synthesize(tmp_path, 1, HEAD)
    assert (tmp_path / "synthetic-0-000000" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_subjects", 0), ("num_proc", 0), ("seed", -1), ("image_size", 4), ("views", 13), ("timesteps", 0)],
)
def test_a_number_out_of_range_is_named(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}, expected"):
        synthesize(tmp_path / "out", **({"num_subjects": 1} | {name: value}))
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_is_wrong_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--num_subjects", "1", "--head", "nowhere.safetensors", "--output_dir", str(tmp_path / "out")])
    assert exit_.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "nowhere.safetensors" in error
    assert error.count("\n") == 1


def test_the_command_writes_subjects(tmp_path, capsys):
    main(["--num_subjects", "2", "--output_dir", str(tmp_path / "out"), "--image_size", "16", "--num_points", "200"])
    printed = capsys.readouterr().out
    assert "2 subjects in" in printed
    assert len(find_subjects(tmp_path / "out")) == 2


def test_plain_is_short_for_its_four_options(tmp_path):
    common = ["--num_subjects", "1", "--image_size", "16", "--num_points", "40"]
    main([*common, "--output_dir", str(tmp_path / "short"), "--plain"])
    long = [word for name, value in PLAIN.items() for word in (f"--{name}", value)]
    main([*common, "--output_dir", str(tmp_path / "long"), *long])
    main([*common, "--output_dir", str(tmp_path / "varied")])
    assert hashes(tmp_path / "short") == hashes(tmp_path / "long") != hashes(tmp_path / "varied")


# ---- straight to a corpus

SETTINGS = BuildSettings(n_bins=64, num_validation=2, shard_size=4_000, seed=5)


def source(count, **changes):
    settings = {"seed": 5, "image_size": 16, "views": 2, "timesteps": 2, "num_points": 60} | changes
    return SyntheticSource(count, SyntheticSettings(**settings))


@pytest.fixture(scope="module")
def corpus(head, tmp_path_factory):
    """Six subjects straight to a corpus, in one go."""
    output = tmp_path_factory.mktemp("straight") / "corpus"
    build(source(6), head, output, SETTINGS, progress=False)
    return output


def test_a_corpus_without_folders_is_that_of_the_folders_byte_for_byte(corpus, head, tmp_path):
    synthesize(tmp_path / "subjects", 6, HEAD, seed=5, image_size=16, views=2, timesteps=2, num_points=60)
    build(tmp_path / "subjects", head, tmp_path / "corpus", SETTINGS, progress=False)
    assert hashes(tmp_path / "corpus") == hashes(corpus)
    assert len(list(corpus.glob("frames/train-*"))) > 2  # images of one subject in two files
    assert [path.name for path in corpus.parent.iterdir()] == ["corpus"]


def test_a_corpus_killed_at_random_moments_keeps_its_subjects_and_ends_with_the_same_bytes(corpus, head, tmp_path):
    output = tmp_path / "corpus"
    staging = staging_folder(output)
    # From a server without threads: a fork of this process would inherit locks that nobody gives back.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gaussian_tokenizer.synthesize", "gaussian_tokenizer.corpus.building"])
    rng = random.Random(0)
    found = []
    for attempt in range(20):
        process = context.Process(target=build, args=(source(6), head, output, SETTINGS), kwargs={"progress": False})
        process.start()
        wanted, deadline = attempt, time.monotonic() + 10
        while (
            len([*staging.glob("subjects/*.safetensors"), *staging.glob("done/*.json")]) <= wanted
            and not output.exists()
            and time.monotonic() < deadline
        ):
            time.sleep(0.0005)
        time.sleep(rng.random() * 0.01)
        process.kill()
        process.join()
        found.append({path.name: path.stat().st_ino for path in staging.glob("subjects/*.safetensors")})
        if output.exists():
            break
    assert any(0 < len(subjects) < 6 for subjects in found)
    if output.exists():
        assert found[-1].items() <= found[-2].items() or found[-1].items() >= found[-2].items()
        del found[-1]  # the corpus is in its place, and what it was made from is being removed
    assert all(before.items() <= after.items() for before, after in itertools.pairwise(found))  # none was made twice
    if not output.exists():
        build(source(6), head, output, SETTINGS, progress=False)
        assert not staging.exists()
    assert hashes(output) == hashes(corpus)


def test_a_half_made_corpus_of_other_subjects_is_not_continued(head, tiny_corpus, tmp_path, monkeypatch):
    from gaussian_tokenizer.corpus import building

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(building, "write_shard", full)
    with pytest.raises(OSError, match="No space left"):
        build(source(3), head, tmp_path / "corpus", SETTINGS, progress=False)
    monkeypatch.undo()
    assert len(list(staging_folder(tmp_path / "corpus").glob("subjects/*"))) == 3  # kept: they took time to make
    with pytest.raises(ValueError, match=r"half-built corpus of other settings: recipe .*'seed': 5.*now .*'seed': 6"):
        build(source(3, seed=6), head, tmp_path / "corpus", SETTINGS, progress=False)
    with pytest.raises(ValueError, match=r"half-built corpus of other settings: recipe .*'captured'.*now .*'regular'"):
        build(source(3, placement="regular"), head, tmp_path / "corpus", SETTINGS, progress=False)
    with pytest.raises(ValueError, match="half-built corpus of other settings: recipe"):
        build(tiny_corpus.parent / "avatars", head, tmp_path / "corpus", SETTINGS, progress=False)
    assert len(list(staging_folder(tmp_path / "corpus").glob("subjects/*"))) == 3  # no refused command took them away


@pytest.mark.distributed
def test_the_command_makes_a_corpus_and_says_what_is_in_it(corpus, tmp_path, capsys):
    options = ["--views", "2", "--timesteps", "2", "--seed", "5", "--image_size", "16", "--num_points", "60"]
    options += ["--n_bins", "64", "--num_validation", "2", "--shard_size", "4000", "--num_proc", "2"]
    main(["--num_subjects", "6", "--corpus", str(tmp_path / "corpus"), *options])
    printed = capsys.readouterr().out
    assert "train: 4 subjects, 16 frames" in printed
    assert hashes(tmp_path / "corpus") == hashes(corpus)


def test_folders_or_a_corpus_must_be_asked_for_and_not_both(tmp_path, capsys):
    for given in ([], ["--output_dir", str(tmp_path / "a"), "--corpus", str(tmp_path / "b")]):
        with pytest.raises(SystemExit):
            main(["--num_subjects", "1", *given])
        assert "give either --output_dir, for folders, or --corpus" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
