"""Windows: the same item whatever was read before it, cut between points, every token learned and counted."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from gaussian_tokenizer.corpus.building import build
from gaussian_tokenizer.corpus.corpus import load_corpus
from gaussian_tokenizer.corpus.options import BuildSettings
from gaussian_tokenizer.heads.procedural_head import build_procedural_head
from gaussian_tokenizer.synthetic.subject import synthesize_subject
from training.common.rows import CONDITION, HEAD_COLUMNS, AvatarRows
from training.pretraining.windows import EvaluationWindows, TrainWindows, collate_windows, disturbed, window_start


class Sequences:
    """Sequences of given lengths whose ids are their positions: what windows read of `AvatarRows`, without a corpus."""

    def __init__(self, *lengths):
        self.lengths = np.array(lengths)

    def __len__(self):
        return len(self.lengths)

    def sequence(self, row):
        return np.arange(self.lengths[row])

    def condition(self, row, pick, chosen=None, image=None):
        return {}


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert np.array_equal(np.asarray(a[name]), np.asarray(b[name])), name


def test_an_item_depends_on_the_seed_and_its_number_only(train_rows):
    windows = TrainWindows(train_rows, 64, 24, seed=3, condition_dropout=0.5)
    again = TrainWindows(train_rows, 64, 24, seed=3, condition_dropout=0.5)
    forwards = [windows[i] for i in range(24)]
    for i in np.random.default_rng(0).permutation(24):
        same(again[int(i)], forwards[i])
    other = TrainWindows(train_rows, 64, 24, seed=4, condition_dropout=0.5)
    assert any(not np.array_equal(other[i]["input_ids"], forwards[i]["input_ids"]) for i in range(24))


def test_workers_read_the_same_items(train_rows):
    windows = TrainWindows(train_rows, 64, 8, seed=0, condition_dropout=0.5)
    loader = DataLoader(windows, batch_size=None, num_workers=2, collate_fn=lambda item: item)
    for i, item in enumerate(loader):
        same(item, windows[i])


def test_an_epoch_visits_every_avatar_once_in_an_order_of_its_own(train_rows):
    windows = TrainWindows(train_rows, 64, 24, seed=0, condition_dropout=0.0)
    n = len(train_rows)
    heads = [windows[i]["head_vertices"].tobytes() for i in range(3 * n)]
    assert len(set(heads)) == n
    assert all(set(heads[k * n : (k + 1) * n]) == set(heads) for k in range(3))
    assert heads[:n] != heads[n : 2 * n]


def test_the_cuts_of_an_epoch_differ():
    windows = TrainWindows(Sequences(*[802] * 50), 64, 100, seed=0, condition_dropout=0.0)
    starts = [int(windows[i]["input_ids"][0]) for i in range(100)]
    assert len(set(starts[:50])) > 20 and len(set(starts[50:])) > 20 and starts[:50] != starts[50:]


def test_windows_are_whole_points_of_the_sequence(train_rows):
    windows = TrainWindows(train_rows, 64, 40, seed=0, condition_dropout=0.0)
    tokenizer = train_rows.tokenizer
    for i in range(40):
        ids = windows[i]["input_ids"]
        assert len(ids) in (64, 62)  # the last window of a sequence ends at eos, after a multiple of four and two more
        faces = (ids >= tokenizer.n_bins) & (ids < tokenizer.n_bins + tokenizer.n_faces)
        assert (np.flatnonzero(faces) % 4 == 0).all()
        assert (ids[0] == tokenizer.bos_token_id) != bool(faces[0])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_condition_is_dropped_in_the_asked_share_of_windows(share):
    windows = TrainWindows(Sequences(6), 4, 2000, seed=0, condition_dropout=share)
    dropped = np.mean([windows[i]["drop_condition"] for i in range(2000)])
    assert abs(dropped - share) <= 5 * np.sqrt(share * (1 - share) / 2000)


@pytest.mark.parametrize("window", [0, 3, 6, 126, -4])
def test_a_window_that_is_not_whole_points_is_refused(window):
    with pytest.raises(ValueError, match=rf"multiple of 4 .*found {window}"):
        TrainWindows(Sequences(100), window, 10, 0, 0.0)


@pytest.mark.parametrize(
    ("length", "window"), [(402, 64), (90, 64), (66, 64), (130, 64), (1602, 512), (14, 64), (402, 4)]
)
def test_no_token_is_seen_less_often_than_one_in_the_middle_nor_more_than_three_times_as_often(length, window):
    random = np.random.default_rng(0)
    draws = 20_000
    starts = np.array([window_start(length, window, random) for _ in range(draws)])
    assert (starts % 4 == 0).all() and starts.min() == 0
    assert starts.max() + window >= length  # the end token is reached
    seen = np.zeros(length)
    for start, count in zip(*np.unique(starts, return_counts=True)):
        seen[start : start + window] += count
    # What the middle of a long sequence gets: window / 4 of the starts before clamping.
    share = draws * (window // 4) / ((window // 4 - 1) + -(-length // 4))
    noise = 5 * np.sqrt(share)
    assert seen.min() >= share - noise
    assert seen.max() <= 3 * share + noise
    if length > window:
        assert abs(seen[0] - share) <= noise and abs(seen[-1] - share) <= noise
    # A window away from both ends all tokens are alike.
    assert (abs(seen[window : length - window - 4] - share) <= noise).all()


@pytest.mark.parametrize("window", [8, 12, 64, 100])
def test_evaluation_predicts_every_token_once_with_half_a_window_of_context(window):
    lengths = (2, 6, 10, 14, 62, 66, 70, 98, 102, 106, 130, 1002)
    windows = EvaluationWindows(Sequences(*lengths), window)
    counted = [np.zeros(length, int) for length in lengths]
    for (row, start, _), item in zip(windows.items, (windows[i] for i in range(len(windows)))):
        assert start % 4 == 0
        assert len(item["input_ids"]) <= window
        labels = item["labels"]
        for t in np.flatnonzero(labels != -100):
            if t == 0:
                assert start == 0
                continue
            assert labels[t] == item["input_ids"][t] == start + t
            counted[row][start + t] += 1
            assert start == 0 or t >= window // 2
    assert all((count[1:] == 1).all() for count in counted)


def test_grouped_windows_hold_whole_points_and_their_batches_whole_groups(train_rows):
    tokenizer = train_rows.tokenizer
    windows = TrainWindows(train_rows, 64, 40, seed=0, condition_dropout=0.0, grouped=True)
    items = [windows[i] for i in range(40)]
    batch = collate_windows(items, tokenizer.pad_token_id, grouped=True)
    groups = batch["input_ids"].unflatten(1, (-1, 4))
    labels = batch["labels"].unflatten(1, (-1, 4))
    face = (groups[..., 3] >= tokenizer.n_bins) & (groups[..., 3] < tokenizer.bos_token_id)
    assert (face == (groups[..., :3] < tokenizer.n_bins).all(-1)).all()
    begins = groups[:, 0, 3] == tokenizer.bos_token_id
    assert 0 < begins.sum() < 40 and (face[:, 0] != begins).all() and (labels[:, 0] == -100).all()
    assert torch.equal(labels[:, 1:][face[:, 1:]], groups[:, 1:][face[:, 1:]])
    ends = groups[:, 1:, 0] == tokenizer.eos_token_id
    assert ends.any() and (labels[:, 1:][ends] == torch.tensor([tokenizer.eos_token_id, -100, -100, -100])).all()


@pytest.mark.parametrize("window", [8, 12, 64])
def test_grouped_evaluation_predicts_every_token_but_bos_once(window):
    class Rows(Sequences):
        tokenizer = SimpleNamespace(pad_token_id=99_999)

    lengths = (2, 6, 10, 62, 66, 70, 102, 1002)
    windows = EvaluationWindows(Rows(*lengths), window, grouped=True)
    counted = [np.zeros(length, int) for length in lengths]
    for i, (row, start, _) in enumerate(windows.items):
        item = windows[i]
        labels = collate_windows([item], 99_999, grouped=True)["labels"][0].numpy()
        for t in np.flatnonzero(labels != -100):
            assert labels[t] == item["input_ids"][t] == start + t - 3  # the padding before bos
            counted[row][start + t - 3] += 1
    assert all((count[1:] == 1).all() for count in counted)


def test_a_batch_is_padded_on_the_right_and_padding_is_not_learned():
    items = [
        {"input_ids": np.arange(8), "labels": np.arange(8), "drop_condition": True},
        {"input_ids": np.arange(5), "labels": np.array([-100, -100, 2, 3, 4]), "drop_condition": False},
    ]
    batch = collate_windows(items, pad_token_id=99)
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 99, 99, 99]]
    assert batch["labels"].tolist() == [[-100, 1, 2, 3, 4, 5, 6, 7], [-100, -100, 2, 3, 4, -100, -100, -100]]
    assert batch["drop_condition"].tolist() == [True, False]
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64


def test_a_batch_carries_the_conditions_of_its_rows(train_rows):
    windows = TrainWindows(train_rows, 64, 3, seed=0, condition_dropout=0.0)
    items = [windows[i] for i in range(3)]
    batch = collate_windows(items, 0)
    assert batch["pixel_values"].shape == (3, 3, 56, 56)
    assert batch["head_vertices"].shape == batch["head_normals"].shape
    assert torch.equal(batch["head_vertices"][1], torch.from_numpy(items[1]["head_vertices"]))
    assert torch.allclose(batch["head_normals"].norm(dim=-1), torch.ones(()), atol=1e-2)


def test_the_portrait_of_a_window_is_one_of_its_subject(train_rows, corpus):
    windows = TrainWindows(train_rows, 64, 24, seed=0, condition_dropout=0.0)
    avatars, frames = corpus.avatars("train").with_format("numpy"), corpus.frames("train")
    chosen = set()
    for i in range(24):
        item = windows[i]
        row = next(r for r in range(8) if np.array_equal(avatars[r]["head_vertices"], item["head_vertices"]))
        images = [frames[j]["image"] for j in corpus.frame_rows("train")[str(avatars[row]["avatar_id"])]]
        expected = [corpus.tokenizer(images=image)["pixel_values"][0] for image in images]
        same = [j for j, values in enumerate(expected) if np.array_equal(item["pixel_values"], values)]
        assert len(same) == 1
        chosen.add(same[0])
    assert chosen == {0, 1, 2, 3}  # any of them, in the course of the epochs


def test_avatars_without_images_are_refused_where_the_model_reads_a_portrait(tmp_path):
    head = build_procedural_head(600)
    for i in range(3):
        synthesize_subject(head, i, 20).avatar.save(tmp_path / "avatars" / f"a{i}")
    settings = BuildSettings(num_validation=1, allow_unknown_license=True)
    build(tmp_path / "avatars", head, tmp_path / "corpus", settings, progress=False)
    corpus = load_corpus(tmp_path / "corpus")
    with pytest.raises(ValueError, match=r"2 avatars of 'train' have no images.*--use_vision_encoder false"):
        AvatarRows(corpus, "train", CONDITION[:3])
    assert len(AvatarRows(corpus, "train", HEAD_COLUMNS)) == 2


def test_disturbed_windows_have_random_x_and_z_in_a_random_share_of_their_points(train_rows):
    tokenizer = train_rows.tokenizer
    options = dict(window=64, num_items=60, seed=3, condition_dropout=0.5, grouped=True)
    clean, noisy = (TrainWindows(train_rows, **options, context_noise=share) for share in (0.0, 0.5))
    shares = []
    for i in range(60):
        was, item = clean[i], noisy[i]
        assert all(np.array_equal(item[name], was[name]) for name in was if name != "input_ids")
        assert np.array_equal(item["labels"], was["input_ids"]) and len(item["input_ids"]) == len(item["labels"])
        before, after = (
            np.resize(each["input_ids"], len(was["labels"]) // 4 * 4).reshape(-1, 4) for each in (was, item)
        )
        assert np.array_equal(before[:, 1::2], after[:, 1::2])  # y and face
        points = before[:, 3] < tokenizer.bos_token_id
        assert np.array_equal(before[~points], after[~points]) and (after[points][:, ::2] < tokenizer.n_bins).all()
        shares.append((before != after).any(1)[points].mean())
    shares = np.array(shares)
    assert 0.3 < (shares == 0).mean() < 0.7 and 0.25 < shares[shares > 0].mean() < 0.75
    same(noisy[7], TrainWindows(train_rows, **options, context_noise=0.5)[7])


def test_noise_is_spread_over_all_bins():
    ids = np.tile([3, 1, 4, 20], (4000, 1))
    found = disturbed(ids.ravel(), 16, np.random.default_rng(0)).reshape(-1, 4)
    changed = (found != ids).any(1)
    for column in (0, 2):
        counts = np.bincount(found[changed, column], minlength=16)
        assert (counts > 0.5 * counts.mean()).all()


def test_noise_needs_whole_points(train_rows):
    with pytest.raises(ValueError, match="--context_noise needs --level point"):
        TrainWindows(train_rows, 64, 4, seed=0, condition_dropout=0.0, context_noise=0.5)
    with pytest.raises(ValueError, match="--context_noise is a share, 0 to 1, found 30"):
        TrainWindows(train_rows, 64, 4, seed=0, condition_dropout=0.0, grouped=True, context_noise=30)
