"""Sequences that the point model generates for its training subjects, as training data of the decoder.

At inference the decoder gets generated points, which are not where the true ones are. A decoder that has only seen true points
takes every position for correct. One that was also trained on generated points, with the true images of the same subject as
targets, learns to move them (exposure bias, Bengio et al. 2015, https://arxiv.org/abs/1506.03099; here of the second network).

Each subject's sequence is generated once, from its first portrait and its mesh, and kept in a folder. File names are hashes of
everything that the sequences depend on, so a resumed run generates nothing again and another point model never finds
them. Processes share the work.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.numpy import load, save
from tqdm.auto import tqdm

from gaussian_tokenizer.utils.atomic import atomic_file
from modeling import PointillistForCausalLM
from modeling.pipeline import SAMPLING
from modeling.point_features import fingerprint
from training.decoder.subjects import SubjectRows

BATCH = 32  # sequences generated together; the random numbers depend on it
MAX_POINTS_PER_FACE = 15


def generated_sequences(
    point_model: PointillistForCausalLM, subjects: SubjectRows, folder: Path, seed: int, progress: bool = True
) -> list[np.ndarray]:
    """Token ids (L,) int64 of a generated sequence for every subject; all are whole sequences.

    Args:
        point_model: on the device where it is to run.
        subjects: a split with portraits.
        folder: keeps the sequences; created if missing.
        seed: of the sampling.
    """
    state = PartialState()
    ids = subjects.rows.ids[: len(subjects)]
    max_points = int(subjects.rows.lengths[: len(subjects)].max()) // 4
    depends = [fingerprint(point_model), sorted(SAMPLING.items()), max_points, seed, len(subjects), BATCH, ids]
    digest = hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    batches = [range(begin, min(begin + BATCH, len(subjects))) for begin in range(0, len(subjects), BATCH)]
    paths = [folder / f"{digest}-{number:05d}.safetensors" for number in range(len(batches))]
    share = range(state.process_index, len(batches), state.num_processes)
    for number in tqdm(share, "generating sequences", disable=not (progress and state.is_main_process)):
        if _read(paths[number]) is None:
            generated = _generate(point_model, subjects, batches[number], max_points, seed + number)
            with atomic_file(paths[number]) as file:
                file.write(save({str(row): sequence for row, sequence in zip(batches[number], generated)}))
    state.wait_for_everyone()
    sequences: dict[str, np.ndarray] = {}
    for path in paths:
        sequences |= load(path.read_bytes())
    return [sequences[str(row)] for row in range(len(subjects))]


@torch.no_grad()
def _generate(
    point_model: PointillistForCausalLM, subjects: SubjectRows, rows: range, max_points: int, seed: int
) -> list[np.ndarray]:
    items = [subjects.rows.condition(row, None) for row in rows]
    device, config = point_model.device, point_model.config
    names = point_model.select_inputs(items[0])
    condition = {name: torch.from_numpy(np.stack([item[name] for item in items])).to(device) for name in names}
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        torch.manual_seed(seed)
        limits = {"max_points": max_points, "max_points_per_face": MAX_POINTS_PER_FACE}
        ids = point_model.generate(**condition, **SAMPLING, **limits).cpu()
    lengths = (ids < config.bos_token_id).sum(1)  # without eos, which a sequence that reached max_points lacks
    return [row[: 1 + 4 * (int(length) // 4)].numpy() for row, length in zip(ids, lengths)]


def _read(path: Path) -> dict[str, np.ndarray] | None:
    """The sequences of a file, or None if it is missing or damaged."""
    try:
        return load(path.read_bytes())
    except (FileNotFoundError, SafetensorError):
        return None
