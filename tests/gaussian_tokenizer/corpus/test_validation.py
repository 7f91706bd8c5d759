"""Validation against the avatars a corpus was made from: what differs is found and named, what does not is not."""

import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.build_corpus import main
from gaussian_tokenizer.corpus.building import build
from gaussian_tokenizer.corpus.options import BuildSettings
from gaussian_tokenizer.corpus.validation import validate
from gaussian_tokenizer.heads.procedural_head import build_procedural_head

HEAD = build_procedural_head(600)


def problems(corpus, avatars):
    return {verdict.file: verdict.problems for verdict in validate(corpus, avatars, HEAD) if verdict.problems}


@pytest.fixture
def avatars(tiny_corpus, tmp_path):
    """The folder that the tiny corpus was made from, for a test to change."""
    return shutil.copytree(tiny_corpus.parent / "avatars", tmp_path / "avatars")


@pytest.fixture
def changed(avatars):
    """One of its subjects, of the training split."""
    return avatars / "synthetic-0-000003"


def change_avatar(folder, change):
    avatar = GaussianAvatar.load(folder, HEAD)
    change(avatar)
    avatar.save(folder)


def test_a_corpus_agrees_with_the_avatars_it_was_made_from(tiny_corpus):
    assert problems(tiny_corpus, tiny_corpus.parent / "avatars") == {}


def test_points_outside_the_bounds_are_compared_with_where_they_were_moved(tiny_corpus, tmp_path):
    settings = BuildSettings(bounds=[[-0.05] * 3, [0.05] * 3], num_validation=4)
    manifest = build(tiny_corpus.parent / "avatars", HEAD, tmp_path / "corpus", settings, progress=False)
    assert manifest["splits"]["train"]["num_out_of_bounds"] > 0
    assert problems(tmp_path / "corpus", tiny_corpus.parent / "avatars") == {}


def test_a_point_that_moved_by_a_bin_is_found_and_one_that_moved_by_less_is_not(tiny_corpus, avatars, changed):
    scale = GaussianAvatar.load(changed, HEAD)._canonical_frames().scales
    width = np.diff(json.loads((tiny_corpus / "corpus.json").read_text())["tokenizer"]["bounds"], axis=0).min() / 64

    def move(meters):
        def change(avatar):
            avatar.positions[5, 1] += meters / float(scale[avatar.faces[5]])

        return change

    change_avatar(changed, move(1e-8))
    assert problems(tiny_corpus, avatars) == {}
    change_avatar(changed, move(2 * width))
    [(file, [problem])] = problems(tiny_corpus, avatars).items()
    assert file.startswith("avatars/train") and "(synthetic-0-000003): " in problem
    moved, much = re.search(r"(\d+) points are not where they are in .*, by up to ([0-9.]+) mm", problem).groups()
    assert 1 <= int(moved) <= 4 and float(much) > 1000 * width  # the points of its face change places among themselves


def test_a_point_on_another_face_is_found(tiny_corpus, avatars, changed):
    def change(avatar):
        avatar.faces[5] = (avatar.faces[5] + 1) % HEAD.n_faces

    change_avatar(changed, change)
    [[problem]] = problems(tiny_corpus, avatars).values()
    assert "points on face" in problem and str(changed) in problem


def test_another_head_other_metadata_and_another_image_are_found(tiny_corpus, avatars, changed):
    def change(avatar):
        avatar.params.shape[0] += 0.5

    change_avatar(changed, change)
    metadata = json.loads((changed / "metadata.json").read_text())
    (changed / "metadata.json").write_text(json.dumps(metadata | {"consent": "withdrawn"}))
    shutil.copy(changed / "images" / "00000_00.png", changed / "images" / "00001_01.png")
    found = " ".join(problem for listed in problems(tiny_corpus, avatars).values() for problem in listed)
    for what in ("head_vertices are not those of", "metadata are not those of", "image is not that of"):
        assert f"(synthetic-0-000003): {what} {changed}" in found


def test_subjects_that_only_one_side_has_are_named(tiny_corpus, avatars, changed):
    changed.rename(avatars / "moved")
    metadata = json.loads((avatars / "moved" / "metadata.json").read_text())
    (avatars / "moved" / "metadata.json").write_text(json.dumps(metadata | {"avatar_id": "new"}))
    found = problems(tiny_corpus, avatars)
    assert f"{avatars} holds new, the corpus does not" in found.pop("corpus.json")
    assert {problem.split(": ")[1] for listed in found.values() for problem in listed} == {
        f"{avatars} holds no such subject"
    }


def test_a_wrong_id_in_the_corpus_is_found_even_where_the_sequence_stays_valid(tiny_corpus, tmp_path):
    corpus = shutil.copytree(tiny_corpus, tmp_path / "corpus")
    file = next(corpus.glob("avatars/train-*.parquet"))
    table = pq.read_table(file)
    rows = table["input_ids"].to_pylist()
    rows[0][1] += 2 if rows[0][1] < 60 else -2  # the x of the first point, which hardly decides the order
    index = table.schema.get_field_index("input_ids")
    column = pa.array(rows, type=table.schema.field(index).type)
    pq.write_table(table.set_column(index, table.schema.field(index), column), file)
    manifest = json.loads((corpus / "corpus.json").read_text())
    next(s for s in manifest["shards"] if corpus / s["file"] == file)["bytes"] = file.stat().st_size
    (corpus / "corpus.json").write_text(json.dumps(manifest))
    [listed] = problems(corpus, tiny_corpus.parent / "avatars").values()
    assert any("1 points are not where they are in" in problem for problem in listed)


def test_the_command_compares_with_avatars_and_asks_for_the_right_head(tiny_corpus, avatars, capsys):
    command = ["validate", str(tiny_corpus), "--avatars", str(avatars)]
    assert main([*command, "--head", "procedural:600"]) == 0
    assert "complete and consistent" in capsys.readouterr().out
    assert main(command) == 1
    assert "--avatars and --head belong together" in capsys.readouterr().err
    assert main([*command, "--head", "procedural:700"]) == 1
    assert "the avatars are of head model 'procedural:600'" in capsys.readouterr().err
