"""The joint-attention block of the Gaussian decoder: the written formulas, diffusers' blocks, the paper's parameter count."""

import math

import pytest
import torch
from torch import nn

from modeling import GaussianDecoder, GaussianDecoderConfig
from modeling.gaussian_decoder.modeling_gaussian_decoder import JointBlock

CONFIG = GaussianDecoderConfig(hidden_size=32, num_attention_heads=4)


def layer_norm(x, weight, bias, eps):
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def rms_norm(x, gain):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def block_by_the_formulas(p: dict, x: torch.Tensor, c: torch.Tensor, heads: int, last: bool):
    """The MM-DiT block without a time step, one query at a time, in float64: (N, D) and (M, D), one avatar."""
    p = {name: value.double() for name, value in p.items()}
    x, c = x.double(), c.double()
    width = x.shape[-1]
    d = width // heads

    def linear(name, value):
        return value @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    xh = layer_norm(x, p["norm1.weight"], p["norm1.bias"], 1e-5)
    ch = layer_norm(c, p["norm1_context.weight"], p["norm1_context.bias"], 1e-5)
    attended = torch.zeros(len(x) + len(c), width, dtype=torch.double)
    for h in range(heads):
        own = slice(h * d, (h + 1) * d)
        q = torch.cat([
            rms_norm(linear("attn.q_proj", xh)[:, own], p["attn.q_norm.weight"]),
            rms_norm(linear("attn.q_proj_context", ch)[:, own], p["attn.q_norm_context.weight"]),
        ])  # fmt: skip
        k = torch.cat([
            rms_norm(linear("attn.k_proj", xh)[:, own], p["attn.k_norm.weight"]),
            rms_norm(linear("attn.k_proj_context", ch)[:, own], p["attn.k_norm_context.weight"]),
        ])  # fmt: skip
        v = torch.cat([linear("attn.v_proj", xh)[:, own], linear("attn.v_proj_context", ch)[:, own]])
        for i, query in enumerate(q):
            scores = torch.stack([query @ key for key in k]) / math.sqrt(d)
            weights = scores.exp() / scores.exp().sum()
            attended[i, own] = sum(w * value for w, value in zip(weights, v))
    ones, zeros = torch.ones(width, dtype=torch.double), torch.zeros(width, dtype=torch.double)

    def feed_forward(name, value):
        return linear(f"{name}.2", gelu_tanh(linear(f"{name}.0", layer_norm(value, ones, zeros, 1e-6))))

    x = x + linear("attn.o_proj", attended[: len(x)])
    x = x + feed_forward("ff", x)
    if last:
        return x, None
    c = c + linear("attn.o_proj_context", attended[len(x) :])
    return x, c + feed_forward("ff_context", c)


def perturbed_block(last: bool) -> JointBlock:
    """A block none of whose weights and biases has a special value."""
    torch.manual_seed(3)
    block = JointBlock(CONFIG, 0, context_pre_only=last)
    for p in block.parameters():
        p.data.add_(torch.randn_like(p) * 0.2)
    return block


@torch.no_grad()
@pytest.mark.parametrize("last", [False, True])
def test_a_block_computes_the_written_formulas(last):
    block = perturbed_block(last)
    x, c = torch.randn(2, 6, 32), torch.randn(2, 5, 32)
    points, context = block(x, c, None)
    for row in range(2):
        expected_x, expected_c = block_by_the_formulas(block.state_dict(), x[row], c[row], heads=4, last=last)
        torch.testing.assert_close(points[row].double(), expected_x, atol=1e-5, rtol=1e-5)
        if last:
            assert context is None
        else:
            torch.testing.assert_close(context[row].double(), expected_c, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("last", [False, True])
def test_a_block_agrees_with_diffusers(last):
    pytest.importorskip("diffusers")
    from diffusers.models.attention import FeedForward
    from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0

    block = perturbed_block(last)
    theirs = Attention(
        query_dim=32, cross_attention_dim=None, added_kv_proj_dim=32, dim_head=8, heads=4, out_dim=32, bias=True,
        context_pre_only=last, processor=JointAttnProcessor2_0(), qk_norm="rms_norm", eps=1e-6,
    )  # fmt: skip
    names = {
        "q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "o_proj": "to_out.0", "q_norm": "norm_q",
        "k_norm": "norm_k", "q_proj_context": "add_q_proj", "k_proj_context": "add_k_proj",
        "v_proj_context": "add_v_proj", "o_proj_context": "to_add_out", "q_norm_context": "norm_added_q",
        "k_norm_context": "norm_added_k",
    }  # fmt: skip
    renamed = {}
    for name, value in block.attn.state_dict().items():
        module, kind = name.rsplit(".", 1)
        renamed[f"{names[module]}.{kind}"] = value
    theirs.load_state_dict(renamed)  # strict: they have exactly our parameters
    x, c = torch.randn(2, 6, 32), torch.randn(2, 5, 32)
    ours_x, ours_c = block.attn(x, c, None)
    result = theirs(hidden_states=x, encoder_hidden_states=c)
    torch.testing.assert_close(ours_x, result[0], atol=1e-5, rtol=1e-5)
    if not last:
        torch.testing.assert_close(ours_c, result[1], atol=1e-5, rtol=1e-5)
    ff = FeedForward(dim=32, dim_out=32, activation_fn="gelu-approximate")
    ff.load_state_dict({f"net.{'0.proj' if k[0] == '0' else '2'}.{k[2:]}": v for k, v in block.ff.state_dict().items()})
    torch.testing.assert_close(block.ff(x), ff(x), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_with_one_set_of_weights_and_no_head_norm_it_is_multi_head_attention_over_both_streams():
    attention = perturbed_block(False).attn
    for name in ("q", "k"):
        setattr(attention, f"{name}_norm", nn.Identity())
        setattr(attention, f"{name}_norm_context", nn.Identity())
    theirs = nn.MultiheadAttention(32, 4, batch_first=True)
    projections = [getattr(attention, f"{name}_proj") for name in "qkv"]
    theirs.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
    theirs.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
    theirs.out_proj.load_state_dict(attention.o_proj.state_dict())
    for name in "qkvo":
        getattr(attention, f"{name}_proj_context").load_state_dict(getattr(attention, f"{name}_proj").state_dict())
    x, c = torch.randn(2, 6, 32), torch.randn(2, 5, 32)
    both = torch.cat((x, c), 1)
    expected = theirs(both, both, both)[0]
    torch.testing.assert_close(torch.cat(attention(x, c, None), 1), expected, atol=1e-5, rtol=1e-5)


def test_the_papers_blocks_have_the_parameters_of_the_arithmetic():
    with torch.device("meta"):
        decoder = GaussianDecoder(GaussianDecoderConfig())
    D, d = 1024, 64
    stream = 4 * (D * D + D) + (8 * D * D + 5 * D) + 2 * D  # q, k, v, o; feed-forward; affine norm
    full = 2 * stream + 4 * d  # and the gains of queries and keys
    last = stream + 3 * (D * D + D) + 2 * D + 4 * d  # the context has q, k, v and a norm only
    assert (round(full / 1e6, 2), round(last / 1e6, 2)) == (25.19, 15.75)
    assert sum(p.numel() for p in decoder.blocks.parameters()) == 11 * full + last == 292_819_968
