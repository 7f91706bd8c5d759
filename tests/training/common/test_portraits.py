"""Augmented portraits: the formulas against loops, what depends on what, and that targets keep the portrait's colors."""

import numpy as np
import pytest
from PIL import Image

from gaussian_tokenizer.tokenizer.processing_conditions import portrait_rgba
from training.common import portraits
from training.common.portraits import BACKGROUNDS, ColorChange, PortraitAugmentation, laid_on
from training.common.rows import CONDITION, AvatarRows
from training.decoder.subjects import SubjectRows, TrainSubjects
from training.pretraining.windows import TrainWindows


def portrait(seed: int = 0, size: tuple[int, int] = (20, 24)) -> Image.Image:
    """RGBA of random colors: opaque in the middle, half transparent beside it, nothing around."""
    values = np.random.default_rng(seed).integers(0, 256, (*size, 4)).astype(np.uint8)
    values[..., 3] = 0
    values[4:-4, 4:-4, 3] = 128
    values[6:-6, 6:-6, 3] = 255
    return Image.fromarray(values)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float64) / 255


@pytest.fixture
def flawless(monkeypatch):
    for name in ("BLURRED", "NOISY", "COMPRESSED"):
        monkeypatch.setattr(portraits, name, 0)


def test_a_color_change_is_gain_and_balance_and_then_gamma():
    random = np.random.default_rng(1)
    change, colors = ColorChange.draw(random), random.random((5, 3))
    expected = [
        [min(max(change.gain * change.balance[c] * color[c], 0), 1) ** change.gamma for c in range(3)]
        for color in colors
    ]
    found = change(colors)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert change(np.ones(3) * 9).max() <= 1


@pytest.mark.parametrize("kind", BACKGROUNDS)
def test_a_portrait_is_its_changed_colors_composited_over_a_background(flawless, monkeypatch, kind):
    monkeypatch.setattr(portraits, "BACKGROUNDS", {kind: 1.0})
    source, seen = portrait(), []
    original = portraits._background
    monkeypatch.setattr(portraits, "_background", lambda *given: seen.append(original(*given)) or seen[-1])
    augmentation = PortraitAugmentation(3, 5, lambda random: portrait(9, (30, 10)))
    result, given, change = pixels(augmentation(source)), pixels(source), augmentation.color
    assert result.shape == given.shape and seen[0].min() >= 0 and seen[0].max() <= 1
    for y in range(given.shape[0]):
        for x in range(given.shape[1]):
            alpha = given[y, x, 3]
            for c in range(3):
                own = min(max(change.gain * float(change.balance[c]) * given[y, x, c], 0), 1) ** change.gamma
                expected = own * alpha + float(seen[0][y, x, c]) * (1 - alpha)
                assert abs(result[y, x, c] - expected) < 0.5 / 255 + 1e-5


def test_flaws_stay_small_and_alpha_is_lost_in_half_of_the_portraits():
    source, hidden = portrait(), []
    for index in range(60):
        augmentation = PortraitAugmentation(0, index, lambda random: portrait(1))
        result = pixels(augmentation(source))
        hidden.append(bool((result[..., 3] == 1).all()))
        if not hidden[-1]:
            np.testing.assert_array_equal(result[..., 3], pixels(source)[..., 3])
    assert 15 < sum(hidden) < 45


def test_an_augmentation_depends_on_seed_and_index_alone():
    def result(seed, index):
        return np.asarray(
            PortraitAugmentation(seed, index, lambda random: portrait(int(random.integers(9))))(portrait())
        )

    for index in range(12):
        np.testing.assert_array_equal(result(4, index), result(4, index))
    different = {result(seed, index).tobytes() for seed in (4, 5) for index in range(12)}
    assert len(different) == 24


def test_an_opaque_photograph_keeps_its_background_but_for_color(flawless):
    photograph = portrait().convert("RGB")
    augmentation = PortraitAugmentation(0, 0, lambda random: portrait(1))
    result = pixels(augmentation(photograph))
    np.testing.assert_allclose(result[..., :3], augmentation.color(pixels(photograph)), atol=0.51 / 255)
    assert (result[..., 3] == 1).all()


def test_laid_on_composites_and_keeps_alpha():
    random = np.random.default_rng(0)
    images, colors = random.random((2, 4, 3, 2)), random.random((2, 3))
    laid = laid_on(images, colors)
    for image, color, found in zip(images, colors, laid):
        for y in range(3):
            for x in range(2):
                alpha = image[3, y, x]
                np.testing.assert_allclose(found[:3, y, x], image[:3, y, x] * alpha + color * (1 - alpha))
        np.testing.assert_array_equal(found[3], image[3])


# ---- in the two trainings


@pytest.fixture(scope="module")
def subjects(corpus) -> SubjectRows:
    return SubjectRows(corpus, "train", CONDITION[:3], read_portrait=True)


def test_targets_get_the_portraits_change_of_color_and_nothing_else(subjects, flawless):
    plain, augmented = (
        TrainSubjects(subjects, 40, 2, seed=1, random_source=True, augment_portraits=on) for on in (False, True)
    )
    for index in (0, 7, 39):
        before, after = plain[index], augmented[index]
        color = PortraitAugmentation(1, index, subjects.rows.any_image).color
        images, expected = after.pop("images"), before.pop("images")
        np.testing.assert_array_equal(images[..., 3], expected[..., 3])
        np.testing.assert_array_equal(images[..., :3], color(expected[..., :3]))
        changed = {name for name in before if not np.array_equal(before[name], after[name])}
        assert changed == {"pixel_values", "portrait"}


def test_a_pixel_of_the_portrait_has_the_color_of_the_same_pixel_of_its_target(subjects, flawless):
    train = TrainSubjects(subjects, 40, 9, seed=0, random_source=False, augment_portraits=True)
    item = train[4]
    portrait_camera = item["portrait_viewmats"][0]
    same = [i for i in range(9) if np.array_equal(item["viewmats"][i], portrait_camera)
            and np.array_equal(item["expr"][i], item["portrait_expr"][0])]  # fmt: skip
    assert same
    target, own = item["images"][same[0]], item["portrait"][0].transpose(1, 2, 0)
    opaque = target[..., 3] == 1
    assert opaque.sum() > 100
    np.testing.assert_allclose(own[opaque, :3], target[opaque, :3], atol=0.51 / 255)


def test_both_readers_of_a_portrait_see_the_same_augmented_image(subjects):
    train = TrainSubjects(subjects, 40, 1, seed=2, random_source=False, augment_portraits=True)
    item = train[11]
    again = train[11]
    for name in item:
        np.testing.assert_array_equal(item[name], again[name])
    values = np.rint(255 * item["portrait"][0]).astype(np.uint8).transpose(1, 2, 0)
    expected = subjects.tokenizer(images=Image.fromarray(values))["pixel_values"][0]
    np.testing.assert_array_equal(item["pixel_values"], expected)
    assert portrait_rgba(Image.fromarray(values), 56).shape == item["portrait"].shape[1:]


def test_windows_differ_in_nothing_but_the_portrait(train_rows):
    plain, augmented = (TrainWindows(train_rows, 64, 24, 3, 0.5, augment_portraits=on) for on in (False, True))
    for index in range(6):
        before, after, again = plain[index], augmented[index], augmented[index]
        for name in before:
            assert np.array_equal(before[name], after[name]) == (name != "pixel_values"), name
        np.testing.assert_array_equal(after["pixel_values"], again["pixel_values"])


def test_a_model_without_portraits_cannot_have_them_augmented(corpus):
    rows = AvatarRows(corpus, "train", ())
    with pytest.raises(ValueError, match="--augment_portraits needs a model that reads portraits"):
        TrainWindows(rows, 64, 24, 3, 0.5, augment_portraits=True)
