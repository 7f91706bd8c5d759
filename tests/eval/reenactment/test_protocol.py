"""The pairs, the exported protocol, and every way in which frames of another method can be wrong."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.reenactment.clips import open_dataset
from eval.reenactment.protocol import (
    check_frames,
    describe_protocol,
    export_protocol,
    frame_name,
    make_pairs,
    read_frames,
)
from gaussian_tokenizer.avatars.export import save_video
from gaussian_tokenizer.heads.head_parameters import HeadParameters


@pytest.fixture
def peer_frames(clips, tmp_path) -> Path:
    """Frames of a method that returns the driver's images."""
    pairs = make_pairs(clips, "both", 0)
    export_protocol(tmp_path / "protocol", pairs, 0)
    for pair in json.loads((tmp_path / "protocol" / "protocol.json").read_text())["pairs"]:
        target = tmp_path / "peer" / pair["mode"] / pair["name"]
        target.mkdir(parents=True)
        for name in pair["frames"]:
            shutil.copy(tmp_path / "protocol" / "drivers" / pair["driver"] / name, target / name)
    return tmp_path / "peer"


def test_in_self_reenactment_a_clip_drives_its_own_first_frame(clips):
    pairs = make_pairs(clips, "self", 0)
    assert [(pair.source, pair.driver, list(pair.rows)) for pair in pairs] == [
        (clip, clip, [1, 2, 3]) for clip in clips
    ]


def test_in_cross_reenactment_every_subject_drives_once_and_none_drives_itself(clips):
    found = set()
    for seed in range(8):
        pairs = make_pairs(clips, "cross", seed)
        assert [pair.source for pair in pairs] == clips
        assert {pair.driver.subject_id for pair in pairs} == {clip.subject_id for clip in clips}
        assert all(pair.driver is not pair.source for pair in pairs)
        found.add(tuple(pair.driver.subject_id for pair in pairs))
    assert len(found) == 2  # three subjects have two such cycles


def test_cross_reenactment_of_one_subject_is_refused(clips):
    for mode in ("cross", "both"):
        with pytest.raises(ValueError, match="needs two subjects, one to drive the other; the dataset has 1"):
            make_pairs(clips[:1], mode, 0)


def test_the_exported_protocol_holds_what_the_pairs_are_made_of(clips, tmp_path):
    pairs = make_pairs(clips, "cross", 0)
    export_protocol(tmp_path / "protocol", pairs, 0)
    pair, folder = pairs[1], tmp_path / "protocol"
    source, driver = pair.source.subject_id, pair.driver.subject_id
    assert np.array_equal(np.asarray(Image.open(folder / "sources" / f"{source}.png")), pair.source.image(0))
    assert HeadParameters.load(folder / "sources" / f"{source}.npz").num_frames == 1
    motion = HeadParameters.load(folder / "drivers" / driver / "flame_param.npz")
    cameras = json.loads((folder / "drivers" / driver / "cameras.json").read_text())["frames"]
    for row in pair.rows:
        drawn = np.asarray(Image.open(folder / "drivers" / driver / frame_name(row)))
        assert np.array_equal(drawn, pair.driver.image(row))
        assert np.array_equal(motion.expr[row], pair.driver.params.expr[row])
        assert np.array_equal(cameras[row]["viewmat"], pair.driver.cameras.viewmats[row])


def test_the_protocol_says_which_frames_are_read_and_exports_them(subjects, bench_head, tmp_path):
    clips = open_dataset(subjects, bench_head, num_subjects=2, num_references=3)
    pairs = make_pairs(clips, "cross", 0)
    export_protocol(tmp_path / "protocol", pairs, 0)
    folder, name = tmp_path / "protocol", clips[0].subject_id
    for row in (1, 2):
        image = Image.open(folder / "references" / name / frame_name(row))
        assert np.array_equal(np.asarray(image), clips[0].image(row))
    assert sorted(path.name for path in (folder / "drivers" / name).glob("*.png")) == [
        frame_name(row) for row in range(3, 8)
    ]
    (first, _) = json.loads((folder / "protocol.json").read_text())["pairs"]
    assert first["reference_cameras"] == [0, 1] and first["frames"] == [frame_name(row) for row in range(3, 8)]
    settings = dict.fromkeys(
        ("num_subjects", "camera", "batch_size", "seed", "candidates", "max_points", "max_points_per_face")
    )
    several, one = (describe_protocol(settings | {"num_references": count}) for count in (3, 1))
    assert "2 more of its clip, evenly spaced" in several["source"] and "but for the frames read" in several["self"]
    assert "more of its clip" not in one["source"] and "from its second frame on" in one["self"]


def test_a_protocol_is_not_written_over_something_else(clips, tmp_path):
    (tmp_path / "mine.txt").write_text("dear diary")
    with pytest.raises(ValueError, match="not empty"):
        export_protocol(tmp_path, make_pairs(clips, "self", 0), 0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_frames_as_expected_are_accepted_and_read(clips, peer_frames):
    for mode in ("self", "cross"):
        pairs = make_pairs(clips, mode, 0)
        assert not check_frames(peer_frames, pairs)
        for pair in pairs:
            assert np.array_equal(read_frames(peer_frames, pair), pair.driver.images(pair.rows))


def test_every_missing_extra_corrupt_and_differently_sized_frame_is_listed(clips, peer_frames):
    pairs = make_pairs(clips, "self", 0)
    first, second = (f"self/{pair.name}" for pair in pairs[:2])
    (peer_frames / first / "00001.png").unlink()
    Image.new("RGB", (32, 32)).save(peer_frames / first / "00004.png")
    (peer_frames / second / "00002.png").write_bytes((peer_frames / second / "00002.png").read_bytes()[:200])
    Image.new("RGB", (64, 32)).save(peer_frames / second / "00003.png")
    (peer_frames / "self" / ".DS_Store").write_text("left by the system")
    problems = check_frames(peer_frames, pairs)
    missing, extra, unreadable, wrong_size = problems
    assert missing == f"missing: {first}/00001.png"
    assert extra == f"extra: {first}/00004.png"
    assert unreadable.startswith("unreadable: ") and f"{second}/00002.png is not a readable image" in unreadable
    assert wrong_size == f"wrong size: {second}/00003.png is (64, 32), expected (32, 32)"


def test_a_video_replaces_the_frames_of_a_pair(clips, peer_frames):
    pytest.importorskip("imageio_ffmpeg")
    pairs = make_pairs(clips, "self", 0)
    for pair in pairs[:3]:
        shutil.rmtree(peer_frames / "self" / pair.name)
        save_video(peer_frames / "self" / f"{pair.name}.mp4", pair.driver.images(pair.rows))
    assert not check_frames(peer_frames, pairs)
    read = read_frames(peer_frames, pairs[0]).astype(int)
    assert np.abs(read - pairs[0].driver.images(pairs[0].rows)).mean() < 8  # H.264 is lossy

    save_video(peer_frames / "self" / f"{pairs[0].name}.mp4", pairs[0].driver.images([1, 2]))
    broken = peer_frames / "self" / f"{pairs[1].name}.mp4"
    broken.write_bytes(broken.read_bytes()[:300])
    missing, unreadable = check_frames(peer_frames, pairs)
    assert missing == f"missing: self/{pairs[0].name}.mp4 has 2 frames, expected 3"
    assert unreadable.startswith("unreadable: ") and f"{pairs[1].name}.mp4 is not a readable video" in unreadable
