"""Clips: the same from a folder of trackings and from a corpus; images on white; what is refused."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from bench import repainted
from PIL import Image

from eval.reenactment.clips import digest, on_white, open_dataset
from eval.reenactment.protocol import make_pairs
from gaussian_tokenizer.captures.loading import load_tracking
from gaussian_tokenizer.heads.procedural_head import build_procedural_head


def test_transparent_images_are_composited_on_white_and_opaque_ones_unchanged():
    rgba = np.random.default_rng(0).integers(0, 256, (7, 5, 4), dtype=np.uint8)
    alpha = rgba[..., 3:].astype(float) / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(on_white(Image.fromarray(rgba)) - expected).max() <= 0.51
    assert np.array_equal(on_white(Image.fromarray(rgba[..., :3])), rgba[..., :3])


def test_a_clip_has_the_images_cameras_and_parameters_of_one_camera_in_order_of_time(subjects, bench_head):
    clip = open_dataset(subjects, bench_head, camera=1)[2]
    tracking = load_tracking(subjects / "synthetic-5-000002", bench_head)
    own = [frame for frame in tracking.frames if frame.camera == 1]
    assert (clip.subject_id, clip.numbers, clip.size) == ("synthetic-5-000002", [1] * 4, (32, 32))
    for row, frame in enumerate(own):
        assert np.array_equal(clip.image(row), on_white(Image.open(frame.image)))
        assert np.allclose(clip.cameras.viewmats[row], frame.viewmat)
        assert torch.equal(clip.params.expr[row], tracking.params.expr[frame.timestep])


def test_all_cameras_are_taken_one_after_the_other_and_a_missing_one_is_refused(subjects, bench_head, clips):
    second = open_dataset(subjects, bench_head, camera=1)
    for clip, *alone in zip(open_dataset(subjects, bench_head), clips, second):
        assert clip.numbers == [0, 0, 0, 0, 1, 1, 1, 1]
        assert np.array_equal(clip.images(range(8)), np.concatenate([each.images(range(4)) for each in alone]))
        assert torch.equal(clip.cameras.viewmats, torch.cat([each.cameras.viewmats for each in alone]))
        assert torch.equal(clip.params.expr, torch.cat([each.params.expr for each in alone]))
    with pytest.raises(ValueError, match="has no camera 7; it has 0, 1"):
        open_dataset(subjects, bench_head, camera=7)


def test_the_first_subjects_and_frames_can_be_chosen(subjects, bench_head, clips):
    chosen = open_dataset(subjects, bench_head, num_subjects=2, num_frames=3)
    assert [clip.subject_id for clip in chosen] == [clip.subject_id for clip in clips[:2]]
    assert [clip.numbers for clip in chosen] == [[0, 0, 0, 1, 1, 1]] * 2 and chosen[0].params.num_frames == 6


def test_reference_frames_come_first_and_are_not_reenacted(subjects, bench_head):
    plain, moved = (open_dataset(subjects, bench_head, num_references=count)[1] for count in (1, 3))
    order = [0, 2, 5, 1, 3, 4, 6, 7]  # of eight: a third and two thirds along
    assert np.array_equal(moved.images(range(8)), plain.images(order))
    assert moved.numbers == [plain.numbers[row] for row in order]
    assert torch.equal(moved.cameras.viewmats, plain.cameras.viewmats[order])
    for name, value in moved.params.per_frame().items():
        assert torch.equal(value, plain.params.per_frame()[name][order])
    for index, reference in enumerate(moved.references(), start=1):
        assert np.array_equal(on_white(reference.image), plain.image(order[index]))
        assert torch.equal(reference.head_params.expr[0], plain.params.expr[order[index]])
        assert torch.equal(reference.camera.viewmats[0], plain.cameras.viewmats[order[index]])
    assert (index, plain.references()) == (2, [])
    assert [list(pair.rows) for pair in make_pairs([moved], "self", 0)] == [[3, 4, 5, 6, 7]]
    with pytest.raises(
        ValueError, match="has 8 frames, expected at least 9: 8 are read for the avatar, the others drive"
    ):
        open_dataset(subjects, bench_head, num_references=8)


def test_a_corpus_gives_the_clips_of_the_folders_it_was_made_of(tiny_corpus, bench_head):
    folders = {clip.subject_id: clip for clip in open_dataset(tiny_corpus.parent / "avatars", bench_head)}
    of_corpus = open_dataset(tiny_corpus, bench_head)
    assert len(of_corpus) == 4
    for clip in of_corpus:
        same = folders[clip.subject_id]
        assert clip.numbers == same.numbers and np.array_equal(clip.images(range(4)), same.images(range(4)))
        assert torch.allclose(clip.cameras.viewmats, same.cameras.viewmats, atol=1e-6)
        assert torch.allclose(clip.cameras.Ks, same.cameras.Ks, atol=1e-4)
        for name, value in clip.params.tensors().items():
            assert torch.equal(value, same.params.tensors()[name]), name


def test_the_digest_follows_images_cameras_and_parameters(subjects, bench_head, clips):
    first = digest(clips)
    assert digest(open_dataset(subjects, bench_head, camera=0)) == first
    moved = replace(clips[0].cameras, viewmats=clips[0].cameras.viewmats + torch.eye(4)[None] * 0)
    moved.viewmats[1, 0, 3] += 1e-3
    smiling = replace(clips[0].params, expr=clips[0].params.expr + 0.01)
    for changed in (repainted(clips[0], 9), replace(clips[0], cameras=moved), replace(clips[0], params=smiling)):
        assert digest([changed, *clips[1:]]) != first


def test_a_subject_of_one_frame_cannot_be_source_and_driver(subjects, bench_head):
    with pytest.raises(ValueError, match="'synthetic-5-000000' has 1 frame, expected at least 2"):
        open_dataset(subjects, bench_head, camera=0, num_frames=1)


def test_subjects_of_another_head_model_are_refused(subjects):
    with pytest.raises(ValueError, match="head"):
        open_dataset(subjects, build_procedural_head(1200))


def test_images_of_two_sizes_are_refused(tiny_corpus, subjects, bench_head, tmp_path):
    shutil.copytree(subjects / "synthetic-5-000000", tmp_path / "small")
    large = sorted((tiny_corpus.parent / "avatars").iterdir())[0]
    shutil.copytree(large, tmp_path / "z")
    with pytest.raises(ValueError, match=r"'synthetic-5-000000' are \(32, 32\) pixels \(width, height\), those of"):
        open_dataset(tmp_path, bench_head)


def test_a_subject_id_that_leads_out_of_a_folder_is_refused(subjects, bench_head, tmp_path):
    shutil.copytree(subjects / "synthetic-5-000000", tmp_path / "one")
    path = tmp_path / "one" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"avatar_id": "../up"}))
    with pytest.raises(ValueError, match="cannot name a file"):
        open_dataset(tmp_path, bench_head)
