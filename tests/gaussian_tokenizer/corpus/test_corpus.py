"""Corpora as they are read: what the rows hold, what a damaged or foreign folder is refused with."""

import hashlib
import json
import shutil
from dataclasses import replace

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from datasets.distributed import split_dataset_by_node
from PIL import Image

from gaussian_tokenizer.avatars.anchoring import points_per_face
from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.captures.frame import Frame
from gaussian_tokenizer.captures.subject import Subject, write_subject
from gaussian_tokenizer.corpus.building import build
from gaussian_tokenizer.corpus.corpus import load_corpus, tokenizer_fingerprint
from gaussian_tokenizer.corpus.html_page import first_images
from gaussian_tokenizer.corpus.options import BuildSettings
from gaussian_tokenizer.corpus.stats import compute_stats
from gaussian_tokenizer.corpus.validation import validate
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.heads.procedural_head import build_procedural_head
from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer

HEAD = build_procedural_head(600)
SETTINGS = BuildSettings(num_validation=2, shard_size=40_000, n_bins=256)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets_cache")


def make_avatar(seed, count, offset=False):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator) * 0.3

    params = HeadParameters.zeros(HEAD.n_shape, HEAD.n_expression, 2)
    params = replace(
        params,
        shape=normal(HEAD.n_shape),
        expr=normal(2, HEAD.n_expression),
        jaw_pose=normal(2, 3) * 0.3,
        static_offset=normal(HEAD.n_vertices, 3) * 0.001 if offset else None,
    )
    faces = torch.randint(0, HEAD.n_faces, (count,), generator=generator)
    tensors = {"sh": normal(count, 1, 3), "opacities": normal(count), "scales": normal(count, 3)}
    return GaussianAvatar(normal(count, 3), faces, quats=normal(count, 4), params=params, **tensors).with_head(HEAD)


def make_subject(folder, seed, count=60, cameras=2, offset=False, **metadata):
    avatar = make_avatar(seed, count, offset)
    viewmat = np.diag([1.0, -1.0, -1.0, 1.0])
    viewmat[:3, 3] = 0.1, 0.2, 1 + 0.1 * seed
    frames = []
    for timestep in range(2):
        for camera in range(cameras):
            image = np.random.default_rng([seed, timestep, camera]).integers(0, 256, (6, 8, 3), dtype=np.uint8)
            params = avatar.params.frame(timestep)
            frames.append(Frame(timestep, camera, viewmat, 20.0, 21.0, 4.5, 2.0, 8, 6, image, params))
    write_subject(folder, avatar, frames, {"license": "CC0-1.0", "consent": "synthetic", **metadata})


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    folder = tmp_path_factory.mktemp("subjects")
    for seed in range(7):
        make_subject(folder / f"s{seed}", seed, count=60 + seed, offset=seed == 3)
    return folder


@pytest.fixture(scope="module")
def built(subjects, tmp_path_factory):
    output = tmp_path_factory.mktemp("corpora") / "corpus"
    build(subjects, HEAD, output, SETTINGS, progress=False)
    return output


@pytest.fixture
def copy(built, tmp_path):
    """A corpus that a test may damage."""
    return shutil.copytree(built, tmp_path / "corpus")


def a_shard(corpus, configuration="avatars"):
    manifest = json.loads((corpus / "corpus.json").read_text())
    return corpus / next(s["file"] for s in manifest["shards"] if s["configuration"] == configuration)


def rewrite(corpus, file, change):
    """Change the table of a shard and make the manifest agree with it, as one who mends a corpus by hand would."""
    table = change(pq.read_table(file))
    pq.write_table(table, file)
    manifest = json.loads((corpus / "corpus.json").read_text())
    for shard in manifest["shards"]:
        if corpus / shard["file"] == file:
            shard["bytes"], shard["rows"] = file.stat().st_size, table.num_rows
    (corpus / "corpus.json").write_text(json.dumps(manifest))


def test_rows_of_avatars_hold_what_the_subject_folders_hold(subjects, built):
    corpus = load_corpus(built)
    assert corpus.splits == ("train", "validation")
    rows = [row for split in corpus.splits for row in corpus.avatars(split)]
    assert sorted(row["avatar_id"] for row in rows) == [f"s{seed}" for seed in range(7)]
    for row in rows:
        avatar = Subject.open(subjects / row["avatar_id"]).load_avatar(HEAD)
        np.testing.assert_array_equal(row["input_ids"], corpus.tokenizer(avatar)["input_ids"])
        assert row["num_points"] == len(avatar) and row["num_out_of_bounds"] == 0
        counts = [int((avatar.faces == face).sum()) for face in range(HEAD.n_faces)]
        assert row["points_per_face"] == [counts.count(k) for k in range(max(counts) + 1)]
        vertices = HEAD.canonical_vertices(avatar.params)
        np.testing.assert_array_equal(np.float32(row["head_vertices"]), vertices.numpy())
        np.testing.assert_allclose(np.float32(row["head_normals"]), HEAD.normals(vertices).numpy(), atol=1e-3)
        np.testing.assert_array_equal(np.float32(row["shape"]), avatar.params.shape.numpy())
        np.testing.assert_array_equal(np.float32(row["jaw_pose"]), avatar.params.jaw_pose[0].numpy())
        offset = avatar.params.static_offset
        expected = torch.zeros(HEAD.n_vertices, 3) if offset is None else offset
        np.testing.assert_array_equal(np.float32(row["static_offset"]), expected.numpy())
        assert (row["license"], row["consent"]) == ("CC0-1.0", "synthetic")
        assert json.loads(row["metadata"])["head_hash"] == HEAD.hash
    assert corpus.avatars().features["input_ids"].feature.dtype == "uint16"
    assert all(row["split"] == split for split in corpus.splits for row in corpus.avatars(split))


def test_rows_of_frames_hold_the_bytes_of_the_images_and_their_cameras(subjects, built):
    corpus = load_corpus(built)
    frames = corpus.frames("train")
    for avatar_id, rows in corpus.frame_rows("train").items():
        expected = Subject.open(subjects / avatar_id).frames()
        assert len(rows) == len(expected) == 4
        for row, frame in zip(frames.select(rows), expected):
            assert row["avatar_id"] == avatar_id
            np.testing.assert_array_equal(np.asarray(row["image"]), np.asarray(Image.open(frame.image)))
            np.testing.assert_allclose(np.asarray(row["viewmat"]), frame.viewmat, atol=1e-6)
            assert (row["timestep"], row["camera"]) == (frame.timestep, frame.camera)
            assert (row["fx"], row["fy"], row["cx"], row["cy"]) == (20.0, 21.0, 4.5, 2.0)
            assert (row["width"], row["height"]) == (8, 6)
            np.testing.assert_array_equal(np.float32(row["expr"]), frame.load_params().expr[0].numpy())
    stored = pq.read_table(a_shard(built, "frames"))["image"][0].as_py()
    assert stored["bytes"] == (subjects / stored["path"].replace("_", "/images/", 1)).read_bytes()


@pytest.mark.newest
def test_plain_load_dataset_finds_both_configurations_and_streams_them_over_nodes(built):
    whole = load_dataset(str(built), "avatars")
    assert {split: len(rows) for split, rows in whole.items()} == {"train": 5, "validation": 2}
    assert load_dataset(str(built))["train"].column_names == whole["train"].column_names
    for configuration in ("avatars", "frames"):
        stream = load_dataset(str(built), configuration, split="train", streaming=True)

        def keys(rows):
            return [(row["avatar_id"], row.get("timestep"), row.get("camera")) for row in rows]

        parts = [keys(split_dataset_by_node(stream, rank=rank, world_size=2)) for rank in range(2)]
        assert all(parts) and sorted(map(str, parts[0] + parts[1])) == sorted(map(str, keys(stream)))


def test_the_tokenizer_beside_the_shards_decodes_them(built):
    tokenizer = GaussianTokenizer.from_pretrained(built / "tokenizer")
    assert (tokenizer.head_hash, tokenizer.n_bins) == (HEAD.hash, 256)
    row = load_corpus(built, tokenizer).avatars()[0]
    points = tokenizer.decode(row["input_ids"])
    histogram = points_per_face(points["faces"], HEAD.n_faces)
    assert histogram.tolist() == row["points_per_face"] and histogram.sum() == HEAD.n_faces


def test_a_vocabulary_beyond_65536_is_stored_in_uint32(subjects, tmp_path):
    build(subjects, HEAD, tmp_path / "corpus", replace(SETTINGS, n_bins=66_000), progress=False)
    corpus = load_corpus(tmp_path / "corpus")
    assert corpus.avatars().features["input_ids"].feature.dtype == "uint32"
    assert max(corpus.avatars()[0]["input_ids"]) > 65_535
    assert all(verdict.problems == [] for verdict in validate(tmp_path / "corpus"))


@pytest.fixture(params=["file", "memory"])
def url(request, built):
    """The URL of a corpus in a store that fsspec opens: the local disk, or this process' memory."""
    if request.param == "file":
        yield f"file://{built}"
        return
    store = fsspec.filesystem("memory")
    store.put(str(built), "/bucket/corpus", recursive=True)
    yield "memory://bucket/corpus"
    store.rm("/bucket", recursive=True)


def test_a_corpus_in_an_object_store_is_streamed_like_one_on_the_disk(url, built, monkeypatch):
    monkeypatch.setattr(
        datasets.config, "HF_HUB_OFFLINE", False
    )  # datasets takes every store for the Hub when it copies
    expected, corpus = load_corpus(built), load_corpus(url)
    assert corpus.manifest == expected.manifest and corpus.path.name == "corpus"
    assert corpus.frame_rows("train") == expected.frame_rows("train")
    for name in ("avatars", "frames"):
        for split in corpus.splits:
            stream = getattr(corpus, name)(split, streaming=True)
            assert stream.features == getattr(expected, name)(split).features
            for found, row in zip(stream, getattr(expected, name)(split), strict=True):
                image, its = (np.asarray(each.pop("image", None)) for each in (found, row))
                np.testing.assert_equal(found, row)
                np.testing.assert_equal(image, its)
    assert corpus.avatars("train")[0]["avatar_id"] == expected.avatars("train")[0]["avatar_id"]  # copied to the cache
    parts = [split_dataset_by_node(corpus.frames(streaming=True), rank, 2) for rank in (0, 1)]
    keys = [(row["avatar_id"], row["timestep"], row["camera"]) for part in parts for row in part]
    assert len(keys) == len(set(keys)) == 20


def test_plain_datasets_streams_the_files_of_an_object_store(url):
    files = {"train": f"{url}/frames/train-*.parquet"}
    rows = list(load_dataset("parquet", data_files=files, split="train", streaming=True))
    assert len(rows) == 20 and rows[0]["image"].size == (8, 6)


def test_an_object_store_without_a_corpus_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"memory://nowhere: no corpus\.json there; expected the URL of a folder"
    ):
        load_corpus("memory://nowhere")
    with pytest.raises(ValueError, match=r"nosuch://x: Protocol not known"):
        load_corpus("nosuch://x")


def test_every_image_is_in_the_corpus_once_with_the_bytes_it_had(subjects, built):
    shards = [path.read_bytes() for path in sorted(built.rglob("*.parquet"))]
    images = [path.read_bytes() for path in subjects.glob("*/images/*.png")]
    assert len(images) == 28
    assert [sum(shard.count(image) for shard in shards) for image in images] == [1] * 28


def test_a_corpus_that_was_replaced_is_not_read_from_an_old_cache(subjects, tmp_path):
    build(subjects, HEAD, tmp_path / "corpus", SETTINGS, progress=False)
    before = load_corpus(tmp_path / "corpus").avatars()[0]["input_ids"]
    build(subjects, HEAD, tmp_path / "corpus", replace(SETTINGS, n_bins=512), overwrite=True, progress=False)
    corpus = load_corpus(tmp_path / "corpus")
    assert corpus.tokenizer.n_bins == 512 and corpus.avatars()[0]["input_ids"] != before


# ---- what is refused


def test_folders_that_are_no_corpus_say_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such corpus folder; make one with build_corpus"):
        load_corpus(tmp_path / "corpus")
    (tmp_path / ".corpus.partial").mkdir()
    with pytest.raises(FileNotFoundError, match=r"\.corpus\.partial beside it is half-built; run build_corpus again"):
        load_corpus(tmp_path / "corpus")
    with pytest.raises(FileNotFoundError, match="an unfinished corpus; run build_corpus again"):
        load_corpus(tmp_path / ".corpus.partial")
    with pytest.raises(FileNotFoundError, match=r"not a corpus, it has no corpus\.json"):
        load_corpus(tmp_path)
    (tmp_path / "corpus.json").write_text('{"format": "another"}')
    with pytest.raises(ValueError, match="format 'another'"):
        load_corpus(tmp_path)
    for content, message in (
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "a JSON list, expected an object"),
        ("{}", "format None"),
    ):
        (tmp_path / "corpus.json").write_text(content)
        with pytest.raises(ValueError, match=rf"corpus\.json: .*{message}"):
            load_corpus(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("shards", None, "shards lacks file, configuration, split, rows, bytes, sha256, or has something else there"),
        ("shards", [1], "shards lacks file"),
        ("shards", {"rows": "3"}, "shards lacks rows, or"),
        ("shards", {"bytes": True}, "shards lacks bytes, or"),
        ("shards", {"file": "../secret/train.parquet"}, r"names the shard '\.\./secret/train.parquet'"),
        ("shards", {"file": "/etc/passwd"}, "names the shard '/etc/passwd'"),
        ("splits", [], "splits lacks subjects"),
        ("splits", {"train": 3}, "splits lacks subjects"),
        ("head", "procedural", "head lacks name, hash, n_vertices, n_faces"),
        ("tokenizer", {"fingerprint": 3}, "tokenizer lacks fingerprint"),
        ("skipped", ["s0"], "skipped lacks folder, reason"),
    ],
)
def test_a_corpus_json_that_lacks_something_is_refused(copy, name, value, message):
    path = copy / "corpus.json"
    content = json.loads(path.read_text())
    if name == "shards" and isinstance(value, dict):
        value = [*content["shards"][1:], content["shards"][0] | value]
    if value is None:
        del content[name]
    else:
        content[name] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"corpus\.json: {message}"):
        load_corpus(copy)


def test_the_fingerprint_of_the_papers_token_order_is_that_of_corpora_without_one():
    tokenizer = GaussianTokenizer(n_bins=64, n_faces=600)
    before = json.dumps([64, 600, tokenizer.bounds, "yzx", 667]).encode()
    assert tokenizer_fingerprint(tokenizer) == hashlib.sha256(before).hexdigest()[:16]
    fingerprints = {tokenizer_fingerprint(GaussianTokenizer(64, 600, token_order=o)) for o in ("xyzf", "yzxf", "yzfx")}
    assert len(fingerprints) == 3


def test_a_tokenizer_that_did_not_make_the_ids_is_refused(copy):
    other = GaussianTokenizer(n_bins=512, n_faces=HEAD.n_faces)
    with pytest.raises(ValueError, match=r"made with another tokenizer .*256 bins.*512 bins.*use the corpus' own"):
        load_corpus(copy, other)
    other.save_pretrained(copy / "tokenizer")
    with pytest.raises(ValueError, match="is not the tokenizer this corpus was made with"):
        load_corpus(copy)
    assert validate(copy)[0].problems


@pytest.mark.parametrize("damage", ["cut", "absent", "foreign", "rows"])
def test_a_damaged_shard_is_named_when_the_corpus_is_opened(copy, subjects, damage, tmp_path):
    file = a_shard(copy)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-10])
        message = "corrupted shard, .* bytes, expected"
    elif damage == "absent":
        file.unlink()
        message = "missing from the corpus"
    elif damage == "rows":
        manifest = json.loads((copy / "corpus.json").read_text())
        next(s for s in manifest["shards"] if copy / s["file"] == file)["rows"] += 1
        (copy / "corpus.json").write_text(json.dumps(manifest))
        message = "rows, expected"
    else:
        build(subjects, HEAD, tmp_path / "other", replace(SETTINGS, n_bins=128), progress=False)
        shutil.copy(tmp_path / "other" / file.relative_to(copy), file)
        rewrite(copy, file, lambda table: table)
        message = "its ids are of another tokenizer"
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_corpus(copy)
    assert str(file) in str(error.value)
    bad = [verdict.file for verdict in validate(copy) if verdict.problems]
    assert str(file.relative_to(copy)) in bad


@pytest.mark.parametrize(
    "configuration, read", [("avatars", compute_stats), ("frames", lambda c: [*first_images(c, 9)])]
)
def test_a_shard_damaged_in_its_middle_is_named_by_what_reads_it(copy, configuration, read):
    file = a_shard(copy, configuration)
    content = bytearray(file.read_bytes())
    content[4:-2000] = bytes(len(content) - 2004)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file}: corrupted shard"):
        read(load_corpus(copy))


def test_a_flipped_bit_is_found_by_validate(copy):
    assert all(verdict.problems == [] for verdict in validate(copy))
    file = a_shard(copy, "frames")
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)
    bad = {verdict.file: verdict.problems for verdict in validate(copy) if verdict.problems}
    assert list(bad) == [str(file.relative_to(copy))] and "sha256" in bad[str(file.relative_to(copy))][0]


def set_column(name, change):
    def apply(table):
        values = change(table[name].to_pylist())
        index = table.schema.get_field_index(name)
        return table.set_column(index, table.schema.field(index), [values_to_array(values, table.schema.field(index))])

    return apply


def values_to_array(values, field):
    return pa.array(values, type=field.type)


def swap_points(rows):
    rows[0] = rows[0][:1] + rows[0][5:9] + rows[0][1:5] + rows[0][9:]
    return rows


@pytest.mark.parametrize(
    ("configuration", "name", "change", "message"),
    [
        ("avatars", "input_ids", swap_points, "not sorted by yzx"),
        ("avatars", "input_ids", lambda rows: [rows[0][:-2], *rows[1:]], "do not go from bos to eos"),
        ("avatars", "input_ids", lambda rows: [rows[0][:4] + rows[0][5:], *rows[1:]], "holds id"),
        ("avatars", "input_ids", lambda rows: [[rows[0][0], 60_000, *rows[0][2:]], *rows[1:]], "beyond the vocabulary"),
        ("avatars", "num_points", lambda rows: [rows[0] + 1, *rows[1:]], "num_points is"),
        ("avatars", "points_per_face", lambda rows: [[1, 2], *rows[1:]], "points_per_face is not that of the ids"),
        ("avatars", "avatar_id", lambda rows: [rows[1], *rows[1:]], "avatar_id is there twice, first in train"),
        ("avatars", "split", lambda rows: ["test", *rows[1:]], "says it is of the split 'test'"),
        ("frames", "avatar_id", lambda rows: ["nobody", *rows[1:]], "no such avatar"),
        ("frames", "camera", lambda rows: [rows[1], *rows[1:]], "is there twice"),
        ("frames", "avatar_id", lambda rows: [rows[-1], *rows[1:]], "its frames do not lie together"),
        ("frames", "width", lambda rows: [9, *rows[1:]], "image of"),
        ("frames", "image", lambda rows: [{"bytes": b"x", "path": "x"}, *rows[1:]], "image does not open"),
    ],
)
def test_validate_names_the_row_and_what_is_wrong_with_it(copy, configuration, name, change, message):
    file = a_shard(copy, configuration)
    rewrite(copy, file, set_column(name, change))
    [verdict] = [verdict for verdict in validate(copy) if verdict.file == str(file.relative_to(copy))]
    assert any(message in problem and problem.startswith("row ") for problem in verdict.problems)


def test_a_subject_in_two_splits_is_found(copy):
    validation = next(iter(load_corpus(copy).avatars("validation")))["avatar_id"]
    file = a_shard(copy)
    rewrite(copy, file, set_column("avatar_id", lambda rows: [validation, *rows[1:]]))
    assert any("avatar_id is there twice, first in train" in p for v in validate(copy) for p in v.problems)
