"""Weights of an x-transformers model of the paper's shape, for `PointillistForCausalLM`: the bridge to an official release.

The counterpart is `TransformerWrapper(num_tokens=vocabulary, max_seq_len=W, use_abs_pos_emb=False, attn_layers=Decoder(dim=D,
depth=n, heads=H, attn_dim_head=d, cross_attend=True, rotary_pos_emb=True, use_rmsnorm=True))`. Names change, and the
output channels of q and k that RoPE rotates are permuted: x-transformers pairs channels (2i, 2i + 1), we pair (i, i + half).

    pointillist convert-x-transformers weights.safetensors --config config.json --output_dir DIR
"""

import argparse
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .pointillist.configuration_pointillist import PointillistConfig
from .pointillist.modeling_pointillist import PointillistForCausalLM

OUTSIDE = {
    "token_emb.emb.weight": "model.embed_tokens.weight",
    "to_logits.weight": "lm_head.weight",
    "attn_layers.final_norm.g": "model.norm.weight",
}
ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "o_proj"}
FEED_FORWARD = {"ff.0.0": "fc1", "ff.2": "fc2"}
BLOCKS = {  # names within each of a layer's three blocks
    "self_attn": {f"{theirs}.weight": f"self_attn.{ours}.weight" for theirs, ours in ATTENTION.items()},
    "cross_attn": {f"{theirs}.weight": f"cross_attn.{ours}.weight" for theirs, ours in ATTENTION.items()},
    "mlp": {f"{a}.{kind}": f"{b}.{kind}" for a, b in FEED_FORWARD.items() for kind in ("weight", "bias")},
}
ROTATED = ("self_attn.q_proj.weight", "self_attn.k_proj.weight")


def convert_state_dict(weights: dict[str, Tensor], config: PointillistConfig) -> dict[str, Tensor]:
    """The state dict of a `TransformerWrapper`, or of an `AutoregressiveWrapper` around one, under our names.

    Its norms store gain - 1 (x-transformers' default, `norm_add_unit_offset=True`). The condition encoders have no counterpart
    there. Raises `ValueError` for a weight that is missing or left over.
    """
    weights = {name.removeprefix("net."): w for name, w in weights.items()}
    names = weight_names(config.num_hidden_layers)
    if config.num_attention_heads == 1 and config.head_dim == config.hidden_size:
        # x-transformers adds the output of a single head without a projection.
        identity = torch.eye(config.hidden_size)
        weights = {theirs: identity for theirs in names if theirs.endswith("to_out.weight")} | weights
    missing = [theirs for theirs in names if theirs not in weights]
    if missing:
        raise ValueError(
            f"the x-transformers weights lack {missing[0]!r}, expected those of a Decoder(dim={config.hidden_size}, "
            f"depth={config.num_hidden_layers}, heads={config.num_attention_heads}, attn_dim_head={config.head_dim}, "
            "cross_attend=True); give the --config of the model they are of"
        )
    left = sorted(n for n in weights.keys() - names.keys() if not n.endswith("inv_freq") and "rotary" not in n)
    if left:
        raise ValueError(f"{len(left)} x-transformers weights have no counterpart here, first {left[0]!r}")
    rotated = int(config.head_dim * config.partial_rotary_factor)
    channels = torch.arange(config.head_dim)
    channels[:rotated] = torch.cat((channels[:rotated:2], channels[1:rotated:2]))
    converted = {}
    for theirs, ours in names.items():
        weight = weights[theirs]
        if theirs.endswith(".g"):
            weight = weight + 1.0
        elif ours.endswith(ROTATED):
            weight = weight.unflatten(0, (-1, config.head_dim))[:, channels].flatten(0, 1)
        converted[ours] = weight
    return converted


def weight_names(num_layers: int) -> dict[str, str]:
    """x-transformers' name -> ours, of every weight."""
    names = dict(OUTSIDE)
    for layer in range(num_layers):
        for i, (block, parts) in enumerate(BLOCKS.items()):
            theirs, ours = f"attn_layers.layers.{3 * layer + i}", f"model.layers.{layer}"
            names[f"{theirs}.0.0.g"] = f"{ours}.{block}_norm.weight"
            names |= {f"{theirs}.1.{name}": f"{ours}.{own}" for name, own in parts.items()}
    return names


def load_x_transformers(model: PointillistForCausalLM, weights: dict[str, Tensor]) -> None:
    """Copy x-transformers weights into the decoder of `model`; its condition encoders stay as they are."""
    converted = convert_state_dict(weights, model.config)
    for name, parameter in model.named_parameters():
        found, expected = tuple(converted.get(name, parameter).shape), tuple(parameter.shape)
        if found != expected:
            raise ValueError(f"{name}: the config expects {expected}, the weights have {found}")
    model.load_state_dict(converted, strict=False)


def main() -> None:
    parser = argparse.ArgumentParser(prog="pointillist convert-x-transformers", description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path, help="safetensors file of the x-transformers state dict")
    parser.add_argument("--config", type=Path, help="config.json of the model; default: the paper's")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the checkpoint is written")
    arguments = parser.parse_args()
    try:
        convert_file(**vars(arguments))
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {' '.join(str(error).split())}\n")
    print(f"wrote {arguments.output_dir}")


def convert_file(weights: Path, config: Path | None, output_dir: Path) -> None:
    """Write the checkpoint; `ValueError` or `FileNotFoundError` name a file that is missing or damaged."""
    if not weights.is_file():
        raise FileNotFoundError(f"{weights}: no such file; expected the safetensors of an x-transformers state dict")
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights}: not a whole safetensors file ({error})") from None
    model = PointillistForCausalLM(PointillistConfig.from_json_file(config) if config else PointillistConfig())
    load_x_transformers(model, tensors)
    model.save_pretrained(output_dir)


if __name__ == "__main__":
    main()
