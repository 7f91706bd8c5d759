"""Weights of an x-transformers model of the paper's shape, for `PointillistForCausalLM`: the bridge to an official release.

The counterpart is `TransformerWrapper(num_tokens=vocabulary, max_seq_len=W, use_abs_pos_emb=False, attn_layers=Decoder(dim=D,
depth=n, heads=H, attn_dim_head=d, cross_attend=True, rotary_pos_emb=True, use_rmsnorm=True))`. Names change, and the
output channels of q and k that RoPE rotates are permuted: x-transformers pairs channels (2i, 2i + 1), we pair (i, i + half).

    python -m modeling.convert_x_transformers weights.safetensors --config config.json --output_dir DIR
"""

import argparse
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .pointillist.configuration_pointillist import PointillistConfig
from .pointillist.modeling_pointillist import PointillistForCausalLM

ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "o_proj"}
SUB_BLOCKS = ("self_attn", "cross_attn", "mlp")


def convert_state_dict(
    weights: dict[str, Tensor], config: PointillistConfig, norm_unit_offset: bool = True
) -> dict[str, Tensor]:
    """x-transformers' names -> ours (without the condition encoders, which x-transformers has not).

    Args:
        weights: state dict of a `TransformerWrapper`, or of an `AutoregressiveWrapper` around one.
        norm_unit_offset: its norms store gain - 1 (x-transformers' default, `norm_add_unit_offset=True`).

    Raises:
        ValueError: a weight is missing, left over or of another shape.
    """
    weights = {name.removeprefix("net."): w for name, w in weights.items()}
    order = rotary_channel_order(config)
    converted, used = {}, set()

    def take(theirs: str, ours: str, channels: Tensor | None = None, offset: float = 0.0) -> None:
        if theirs not in weights:
            raise ValueError(
                f"the x-transformers weights lack {theirs!r}, expected those of a Decoder(dim={config.hidden_size}, "
                f"depth={config.num_hidden_layers}, heads={config.num_attention_heads}, attn_dim_head={config.head_dim}, "
                "cross_attend=True); give the --config of the model they are of"
            )
        used.add(theirs)
        converted[ours] = (weights[theirs] if channels is None else weights[theirs][channels]) + offset

    gain = float(norm_unit_offset)
    one_head = config.num_attention_heads == 1 and config.head_dim == config.hidden_size
    take("token_emb.emb.weight", "model.embed_tokens.weight")
    take("to_logits.weight", "lm_head.weight")
    take("attn_layers.final_norm.g", "model.norm.weight", offset=gain)
    for layer in range(config.num_hidden_layers):
        for i, block in enumerate(SUB_BLOCKS):
            theirs, ours = f"attn_layers.layers.{3 * layer + i}", f"model.layers.{layer}"
            take(f"{theirs}.0.0.g", f"{ours}.{block}_norm.weight", offset=gain)
            if block == "mlp":
                for their_name, our_name in (("0.0", "fc1"), ("2", "fc2")):
                    for kind in ("weight", "bias"):
                        take(f"{theirs}.1.ff.{their_name}.{kind}", f"{ours}.{our_name}.{kind}")
            else:
                for their_name, our_name in ATTENTION.items():
                    rotated = block == "self_attn" and their_name in ("to_q", "to_k")
                    heads = config.num_attention_heads if their_name == "to_q" else config.num_key_value_heads
                    channels = head_channels(order, heads) if rotated else None
                    if their_name == "to_out" and one_head and f"{theirs}.1.to_out.weight" not in weights:
                        # What a single head reads, x-transformers adds as it is.
                        converted[f"{ours}.{block}.{our_name}.weight"] = torch.eye(config.hidden_size)
                        continue
                    take(f"{theirs}.1.{their_name}.weight", f"{ours}.{block}.{our_name}.weight", channels)
    left = sorted(n for n in weights.keys() - used if not n.endswith("inv_freq") and "rotary" not in n)
    if left:
        raise ValueError(f"{len(left)} x-transformers weights have no counterpart here, first {left[0]!r}")
    return converted


def rotary_channel_order(config: PointillistConfig) -> Tensor:
    """Order of one head's channels that turns pairs (2i, 2i + 1) into pairs (i, i + half)."""
    rotated = int(config.head_dim * config.partial_rotary_factor)
    return torch.cat((torch.arange(0, rotated, 2), torch.arange(1, rotated, 2), torch.arange(rotated, config.head_dim)))


def head_channels(order: Tensor, heads: int) -> Tensor:
    """The same order for all heads of a projection, as row indices."""
    return (torch.arange(heads)[:, None] * len(order) + order).flatten()


def load_x_transformers(
    model: PointillistForCausalLM, weights: dict[str, Tensor], norm_unit_offset: bool = True
) -> None:
    """Copy x-transformers weights into the decoder of `model`; its condition encoders stay as they are."""
    converted = convert_state_dict(weights, model.config, norm_unit_offset)
    own = model.state_dict()
    for name, weight in converted.items():
        if own[name].shape != weight.shape:
            raise ValueError(
                f"{name}: the config expects {tuple(own[name].shape)}, the weights have {tuple(weight.shape)}"
            )
    model.load_state_dict(converted, strict=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("weights", type=Path, help="safetensors file of the x-transformers state dict")
    parser.add_argument("--config", type=Path, help="config.json of the model; default: the paper's")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the checkpoint is written")
    arguments = parser.parse_args()
    try:
        convert_file(arguments.weights, arguments.config, arguments.output_dir)
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {' '.join(str(error).split())}\n")
    print(f"wrote {arguments.output_dir}")


def convert_file(weights: Path, config: Path | None, output_dir: Path) -> None:
    """Write the checkpoint; ValueError or FileNotFoundError that names a file which is not what it should be."""
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
