"""Sequences that the point model writes for the training of the decoder: whole, written once, and read where asked for."""

import numpy as np
import pytest
import torch

from modeling import PointillistForCausalLM
from modeling.point_features import num_points
from training.common.rows import HEAD_COLUMNS
from training.decoder.generated_sequences import generated_sequences
from training.decoder.subjects import SubjectRows, TrainSubjects


@pytest.fixture(scope="module")
def subjects(corpus) -> SubjectRows:
    return SubjectRows(corpus, "train", HEAD_COLUMNS, max_subjects=3)


@pytest.fixture(scope="module")
def model(point_model) -> PointillistForCausalLM:
    return PointillistForCausalLM.from_pretrained(point_model).eval()


@pytest.fixture(scope="module")
def written(model, subjects, tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "sequences"
    return folder, generated_sequences(model, subjects, folder, seed=3, progress=False)


def test_every_subject_has_a_whole_sequence_of_its_own(written, model, subjects):
    _, sequences = written
    assert len(sequences) == len(subjects) == 3
    longest = subjects.rows.lengths[:3].max() // 4
    for row, sequence in enumerate(sequences):
        assert 0 < int(num_points(torch.from_numpy(sequence)[None], model)) <= longest
        assert sequence.dtype == np.int64 and not np.array_equal(sequence, subjects.rows.sequence(row))


def test_they_are_written_once_and_never_taken_from_another_model_or_seed(written, model, subjects, point_model):
    folder, sequences = written

    def refuse(self, **_):
        raise AssertionError("written again")

    class Silent(PointillistForCausalLM):
        generate = refuse

    again = generated_sequences(Silent.from_pretrained(point_model).eval(), subjects, folder, seed=3, progress=False)
    assert all(np.array_equal(a, b) for a, b in zip(sequences, again))
    other = Silent.from_pretrained(point_model).eval()
    with torch.no_grad():
        next(iter(other.parameters())).add_(0.1)
    for changed, seed in ((other, 3), (Silent.from_pretrained(point_model).eval(), 4)):
        with pytest.raises(AssertionError, match="written again"):
            generated_sequences(changed, subjects, folder, seed=seed, progress=False)


def test_a_damaged_file_is_written_again(written, model, subjects, tmp_path):
    _, sequences = written
    generated_sequences(model, subjects, tmp_path, seed=3, progress=False)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:50])
    again = generated_sequences(model, subjects, tmp_path, seed=3, progress=False)
    assert all(np.array_equal(a, b) for a, b in zip(sequences, again))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_training_reads_them_in_their_share_and_changes_nothing_else(written, subjects, share):
    _, sequences = written
    items = TrainSubjects(subjects, 60, 1, 0, False, sequences, share)
    plain = TrainSubjects(subjects, 60, 1, 0, False)
    own = 0
    for number in range(60):
        item, true = items[number], plain[number]
        own += not np.array_equal(item["input_ids"], true["input_ids"])
        assert any(np.array_equal(item["input_ids"], sequence) for sequence in (*sequences, true["input_ids"]))
        assert all(np.array_equal(item[name], true[name]) for name in true if name != "input_ids")
    assert own == 60 * share if share != 0.5 else 18 < own < 42
