"""Subjects with images: what an item holds, that it depends on its number alone, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from gaussian_tokenizer.captures.subject import find_subjects
from gaussian_tokenizer.heads.procedural_head import build_procedural_head
from gaussian_tokenizer.rendering.splatting import render
from gaussian_tokenizer.synthetic.source import PIXELS_BETWEEN_POINTS
from gaussian_tokenizer.synthetic.subject import portrait_avatar, synthesize_subject
from training.common.portraits import UNKNOWN_ALPHA
from training.common.rows import HEAD_COLUMNS, shuffled_row
from training.decoder.subjects import (
    BACKGROUNDS,
    EvaluationSubjects,
    SubjectRows,
    TrainSubjects,
    cameras_of,
    collate_subjects,
    mean_images,
    motion_of,
    on_background,
    portrait_of,
    rgba,
)


@pytest.fixture(scope="module")
def subjects(corpus) -> SubjectRows:
    return SubjectRows(corpus, "train", HEAD_COLUMNS)


def test_an_item_depends_on_seed_and_number_alone(subjects):
    first, again = (TrainSubjects(subjects, 40, 3, seed=1, random_source=True) for _ in range(2))
    for index in (17, 3, 17, 39):
        a, b = first[index], again[index]
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    other = TrainSubjects(subjects, 40, 3, seed=2, random_source=True)
    assert any(not np.array_equal(first[i]["viewmats"], other[i]["viewmats"]) for i in range(8))


def test_an_epoch_shows_every_subject_once(subjects):
    train = TrainSubjects(subjects, 3 * len(subjects), 1, seed=0, random_source=False)
    shapes = [train[i]["shape"].tobytes() for i in range(2 * len(subjects))]
    assert len(set(shapes[: len(subjects)])) == len(set(shapes[len(subjects) :])) == len(subjects)


def test_targets_are_the_images_cameras_and_moments_of_the_files(subjects, corpus, tiny_corpus):
    avatar_id = str(subjects.rows.avatars[2]["avatar_id"])
    folder = next(s for s in find_subjects(tiny_corpus.parent / "avatars") if s.avatar_id == avatar_id)
    targets = subjects.targets(list(subjects.frame_rows(2)))
    for i, frame in enumerate(folder.frames()):
        truth = np.asarray(Image.open(frame.image).convert("RGBA"), np.float32) / 255
        np.testing.assert_array_equal(targets["images"][i], truth)
        np.testing.assert_allclose(targets["viewmats"][i], frame.viewmat, atol=1e-6)
        np.testing.assert_allclose(targets["Ks"][i], frame.K, rtol=1e-6)
        np.testing.assert_allclose(targets["expr"][i], frame.load_params().expr[0])
        np.testing.assert_allclose(targets["jaw_pose"][i], frame.load_params().jaw_pose[0])


def test_a_subject_drawn_by_an_items_cameras_and_motion_is_its_images(subjects):
    """The one test that a wrong camera, pose or order of any kind cannot pass."""
    head = build_procedural_head(600)
    batch = collate_subjects([EvaluationSubjects(subjects, 16)[row] for row in range(2)], 0)
    assert batch["images"].shape[1] == 4
    for row in range(2):
        index = int(str(subjects.rows.avatars[row]["avatar_id"]).rsplit("-", 1)[1])
        cameras = cameras_of(batch, row)
        spacing = PIXELS_BETWEEN_POINTS / float(cameras.Ks[0, 0, 0])
        avatar = portrait_avatar(synthesize_subject(head, (0, index), num_points=60), spacing)
        drawn = render(avatar.posed(motion_of(batch, row)), cameras, background=0.5).image
        truth = on_background(batch["images"][row], torch.full((4,), 0.5))
        assert (drawn - truth).abs().max() < 0.01  # a step of a byte, and that of a faint transparent one


def test_backgrounds_are_drawn_from_the_grays_and_show_where_a_image_is_transparent(subjects):
    items = [TrainSubjects(subjects, 40, 4, seed=0, random_source=False)[i] for i in range(12)]
    grays = np.concatenate([item["background"] for item in items])
    assert set(grays.tolist()) == set(BACKGROUNDS)
    images, background = torch.from_numpy(items[0]["images"]), torch.from_numpy(items[0]["background"])
    laid = on_background(images, background)
    torch.testing.assert_close(laid[:, 0, 0], background[:, None].expand(-1, 3))
    opaque = images[..., 3] == 1
    assert opaque.any()
    torch.testing.assert_close(laid[opaque], images[..., :3][opaque])


def test_more_targets_than_frames_repeat_frames(subjects):
    assert TrainSubjects(subjects, 4, 9, seed=0, random_source=False)[0]["images"].shape[0] == 9


def test_the_source_is_the_first_image_unless_it_is_to_be_random(subjects):
    fixed = TrainSubjects(subjects, 80, 1, seed=0, random_source=False)
    free = TrainSubjects(subjects, 80, 1, seed=0, random_source=True)
    same = [np.array_equal(fixed[i]["pixel_values"], free[i]["pixel_values"]) for i in range(12)]
    assert any(same) and not all(same)
    row = int(np.random.default_rng((0, 0, 0)).permutation(len(subjects))[0])
    first = subjects.frames[subjects.frame_rows(row)[0]]["image"]
    expected = subjects.tokenizer(images=first)["pixel_values"][0]
    np.testing.assert_array_equal(fixed[0]["pixel_values"], expected)


def test_the_color_behind_a_portrait_is_the_draw_after_those_of_the_targets(corpus):
    """In the order of earlier versions, whose runs are resumed."""
    subjects = SubjectRows(corpus, "train", read_portrait=True)
    hidden = []
    for index in range(8):
        found = TrainSubjects(subjects, 8, 3, seed=5, random_source=False)[index]["portrait"]
        row, random = shuffled_row(index, len(subjects), 5)
        random.choice(4, 3, replace=False), random.choice(BACKGROUNDS, 3), random.random()
        color, hides = random.random(3, np.float32), random.random() < UNKNOWN_ALPHA
        portrait = subjects.subject(row)["portrait"]
        alpha = portrait[:, 3:]
        np.testing.assert_array_equal(found[:, :3], portrait[:, :3] * alpha + color[:, None, None] * (1 - alpha))
        np.testing.assert_array_equal(found[:, 3:], np.ones_like(alpha) if hides else alpha)
        hidden.append(hides)
    assert 0 < sum(hidden) < 8


def test_held_out_frames_are_evenly_spread_and_on_white(subjects):
    rows = list(subjects.frame_rows(0))
    heldout = EvaluationSubjects(subjects, 2)
    assert heldout.frame_rows(0) == [rows[0], rows[len(rows) // 2]]
    assert (heldout[0]["background"] == 1).all()
    assert EvaluationSubjects(subjects, 99).frame_rows(0) == rows


def test_one_to_several_images_are_read_as_many_in_each_item_of_a_step(corpus):
    subjects = SubjectRows(corpus, "train", HEAD_COLUMNS, None, True)
    plain = TrainSubjects(subjects, 40, 2, seed=0, random_source=True)
    train, again = (TrainSubjects(subjects, 40, 2, 0, True, num_references=3, items_per_step=2) for _ in range(2))
    items = [train[index] for index in range(40)]
    counts = [len(item["portrait"]) for item in items]
    assert counts[::2] == counts[1::2] and set(counts) == {1, 2, 3}
    for index in (31, 4):
        for name, value in again[index].items():
            np.testing.assert_array_equal(value, items[index][name])
    for index, item in enumerate(items):
        assert {len(item["portrait_" + name]) for name in ("viewmats", "Ks", "expr")} == {counts[index]}
        np.testing.assert_array_equal(item["pixel_values"], plain[index]["pixel_values"])  # of the source, as before
        shown = list(zip(item["portrait_viewmats"].tolist(), item["portrait_expr"].tolist()))
        assert all(shown.count(each) == 1 for each in shown), "each image once, while there are enough"
    alone = TrainSubjects(subjects, 40, 2, 0, True, num_references=1)
    for name, value in plain[5].items():
        np.testing.assert_array_equal(alone[5][name], value)
    many = TrainSubjects(subjects, 40, 1, 0, False, num_references=9)  # of four images, some again and again
    assert max(len(many[index]["portrait"]) for index in range(20)) > 4


def test_images_that_are_read_are_not_evaluated(corpus):
    subjects = SubjectRows(corpus, "train", HEAD_COLUMNS, None, True)
    rows = list(subjects.frame_rows(1))
    heldout = EvaluationSubjects(subjects, 16, num_references=3)
    assert subjects.frames.select_columns("camera")[rows]["camera"] == [0, 1, 0, 1]
    read = [rows[0], rows[2], rows[1]]  # by camera, then time: 0, 2, 1, 3
    assert heldout.read_rows(1) == read and heldout.frame_rows(1) == [row for row in rows if row not in read]
    first, *others = (batch := portrait_of(collate_subjects([heldout[0], heldout[1]], 0), 1)), *batch.references
    truth = subjects.targets(read)
    for index, portrait in enumerate((first, *others)):
        np.testing.assert_allclose(portrait.camera.viewmats[0], truth["viewmats"][index])
        np.testing.assert_allclose(portrait.params.expr[0], truth["expr"][index])
        expected = on_background(torch.from_numpy(truth["images"][index : index + 1]), torch.ones(1))[0]
        assert (portrait.image[:3].permute(1, 2, 0) - expected).abs().max() < 0.02  # rounded to bytes
    with pytest.raises(ValueError, match="has 4 images, of which --num_references 4 leaves none to evaluate"):
        EvaluationSubjects(subjects, 16, num_references=4)


def test_images_of_two_sizes_are_refused_with_both(subjects, monkeypatch):
    frames = [subjects.frames[0], subjects.frames[1] | {"image": Image.new("RGB", (20, 30))}]
    monkeypatch.setattr(subjects, "frames", frames)
    with pytest.raises(ValueError, match="56x56 and 20x30 pixels"):
        subjects.targets([0, 1])


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (1, 1), 51), [0.2, 0.2, 0.2, 1]),
        (Image.new("RGB", (1, 1), (255, 0, 51)), [1, 0, 0.2, 1]),
        (Image.new("RGBA", (1, 1), (255, 0, 51, 102)), [1, 0, 0.2, 0.4]),
        (Image.fromarray(np.full((1, 1), 13107, np.uint16)), [0.2, 0.2, 0.2, 1]),
        (Image.new("P", (1, 1), 0).convert("P"), [0, 0, 0, 1]),
    ],
)
def test_any_kind_of_image_becomes_colors_and_opacity(image, expected):
    np.testing.assert_allclose(rgba(image)[0, 0], expected, atol=1e-6)


def test_mean_images_are_means_by_camera_on_white(subjects):
    means = mean_images(subjects)
    assert set(means) == set(subjects.frames["camera"])
    for camera, mean in means.items():
        rows = [row for row, other in enumerate(subjects.frames["camera"]) if other == camera]
        images = torch.from_numpy(subjects.targets(rows)["images"])
        torch.testing.assert_close(mean, on_background(images, torch.ones(len(rows))).mean(0))
