"""How well the next token is predicted in each slot, x, y, z and face, in nats per token; and how fast the model learns.

The end token takes the first place of a point, usually that of an x, and is counted there.
"""

import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.trainer_pt_utils import get_model_param_count

from gaussian_tokenizer.tokenizer.point_codec import SLOTS
from modeling import PointillistConfig, PointillistForCausalLM
from training.common.rows import AvatarRows

# Dense bf16 peak of common accelerators in FLOP/s (vendors' data sheets), by a part of the name torch reports.
PEAK_FLOPS = {
    "H200": 989e12, "H100": 989e12, "H20": 148e12, "A100": 312e12, "L40": 181e12, "4090": 165e12, "B200": 2250e12,
}  # fmt: skip


def slot_sums(logits: Tensor, labels: Tensor, config: PointillistConfig) -> Tensor:
    """Logits (B, L, vocabulary) and labels (B, L), -100 where nothing counts -> (B, 3, 4): NLL, hits and tokens of a row and slot.

    A window begins between two points, so position t >= 1 holds token (t - 1) mod 4 of a point. With `loss_within_slot` a token
    competes only with those of its slot, as in training.
    """
    targets, logits = labels[:, 1:], logits[:, :-1].float()
    if config.loss_within_slot:
        is_face = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        is_face[config.slot_tokens()[0][0]] = True
        logits = logits.masked_fill(is_face != is_face[targets.clamp(min=0)][..., None], torch.finfo(logits.dtype).min)
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
    counted = (targets != -100).double()
    hits = (logits.argmax(-1) == targets).double() * counted
    # Windows of the point level begin with a whole group, so their first target is a y.
    places = (torch.arange(targets.shape[1], device=targets.device) + (config.level == "point")) % 4
    sums = torch.stack((nll.view_as(targets).double() * counted, hits, counted), dim=1)  # (B, 3, L - 1)
    return sums.new_zeros(len(sums), 3, 4).index_add_(2, places, sums)[..., config.slot_columns]


def slot_metrics(sums: Tensor) -> dict[str, float]:
    """Sums (3, 4) -> nll, perplexity and accuracy, overall and with `_x`, `_y`, `_z`, `_face` for each slot."""
    nll, hits, counted = sums.double().cpu()
    metrics = {}
    for name, part in {"": slice(None), **{f"_{slot}": slice(i, i + 1) for i, slot in enumerate(SLOTS)}}.items():
        tokens = counted[part].sum().clamp(min=1)
        mean = float(nll[part].sum() / tokens)
        metrics[f"nll{name}"] = mean
        metrics[f"perplexity{name}"] = math.exp(min(mean, 700.0))
        metrics[f"accuracy{name}"] = float(hits[part].sum() / tokens)
    return metrics


def baselines(train: AvatarRows, heldout: AvatarRows) -> dict[str, float]:
    """`unigram_nll` and `uniform_nll` of the held-out split in nats per token, end tokens included.

    Uniform knows only the grammar, unigram also how often a token occurs in its slot in training (counts plus one).
    """
    tokenizer = train.tokenizer
    ids = np.arange(tokenizer.vocab_size)
    of_slots = [ids < tokenizer.n_bins] * 3 + [(ids >= tokenizer.n_bins) & (ids < tokenizer.bos_token_id)]
    possible = np.stack([of_slots[SLOTS.index(slot)] for slot in tokenizer.slots])
    possible[0, tokenizer.eos_token_id] = True
    expected = token_counts(heldout)

    def nll(weights: np.ndarray) -> float:
        probability = weights / weights.sum(1, keepdims=True)
        return float(-(expected * np.log(np.where(possible, probability, 1))).sum() / expected.sum())

    return {"unigram_nll": nll((token_counts(train) + 1) * possible), "uniform_nll": nll(possible)}


def token_counts(rows: AvatarRows) -> np.ndarray:
    """(4, vocabulary): how often each token occurs in each place of a point, bos left out."""
    counts = np.zeros((4, rows.tokenizer.vocab_size))
    for row in range(len(rows)):
        tokens = rows.sequence(row)[1:]
        np.add.at(counts, (np.arange(len(tokens)) % 4, tokens), 1)
    return counts


def decoder_parameters(model: PointillistForCausalLM) -> int:
    """`num_decoder_parameters`, also where ZeRO-3 leaves each process a piece of every weight."""
    return sum(get_model_param_count(module) for module in (model.model, model.lm_head))


def flops_per_token(config, num_parameters: int, window: float, condition_tokens: int) -> float:
    """Training FLOPs (forward and backward) a token: 6 a weight, and 12 a layer, head channel and token attended to.

    A token of a window attends to half of it on average (Kaplan et al. 2020, PaLM appendix B).
    """
    inner = config.num_attention_heads * config.head_dim
    per_position = config.tokens_per_position
    # The embedding is a look-up. At the point level its faces are also the output's keys.
    weights = num_parameters - config.vocab_size * config.hidden_size * (per_position == 1)
    attention = 12 * config.num_hidden_layers * inner * (window / per_position / 2 + condition_tokens)
    return (6 * weights + attention) / per_position


def peak_flops(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a device: by the data sheet of a known accelerator, else measured by a matrix product, on CPUs of this type."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, flops in PEAK_FLOPS.items():
            if part in name:
                return flops
    dtype = torch.bfloat16 if device.type == "cuda" else dtype
    a = torch.randn(1024, 1024, device=device, dtype=dtype)
    best = math.inf
    for _ in range(8):
        begin = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - begin)
    return 2 * 1024**3 / best
