"""The cache has another name since transformers 5.24: both names go in and come out, whichever version is installed."""

from dataclasses import fields

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.generation.utils import GenerateDecoderOnlyOutput

from modeling import PointillistForCausalLM, PointillistOutput, RingCache
from modeling.pointillist.modeling_compatibility import CACHE_NAME, CACHE_NAMES

pytestmark = pytest.mark.newest
POINTS = 20  # 81 tokens: two and a half windows of 32


def greedy(model, condition, **options):
    options = dict(do_sample=False, min_points=POINTS, max_points=POINTS) | options
    return model.generate(condition_embeds=condition, **options)


def test_the_name_of_the_cache_is_that_of_transformers_own_outputs():
    assert CACHE_NAME in {field.name for field in fields(GenerateDecoderOnlyOutput)}
    assert [field.name for field in fields(PointillistOutput)] == [
        "loss", "logits", "last_hidden_state", CACHE_NAME, "hidden_states", "attentions", "cross_attentions",
    ]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_forward_pass_takes_and_returns_the_cache_under_both_names(tiny_model, condition, name):
    ids = torch.randint(0, 36, (2, 12), generator=torch.Generator().manual_seed(0))
    whole = tiny_model(ids, condition_embeds=condition).logits
    first = tiny_model(ids[:, :7], condition_embeds=condition, use_cache=True)
    assert first.cache is first.past_key_values is first[CACHE_NAME] and first.cache.get_seq_length() == 7
    for rest in (
        tiny_model(ids[:, 7:], condition_embeds=condition, **{name: first.cache}).logits,
        tiny_model.lm_head(again(tiny_model, ids, condition, name).last_hidden_state),
    ):
        torch.testing.assert_close(rest, whole[:, 7:], atol=1e-5, rtol=1e-4)


def again(model: PointillistForCausalLM, ids, condition, name: str):
    """The same by the bare decoder, with a cache of transformers."""
    cache = DynamicCache(config=model.config)
    first = model.model(ids[:, :7], condition=condition, **{name: cache})
    return model.model(ids[:, 7:], condition=condition, **{name: first.cache})


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("kind", ["dynamic", "static", "ring"])
def test_generation_takes_a_cache_under_both_names_and_returns_it(tiny_model, condition, name, kind):
    expected = greedy(tiny_model, condition)
    cache = {
        "dynamic": lambda: DynamicCache(config=tiny_model.config),
        "static": lambda: StaticCache(config=tiny_model.config, max_cache_len=4 * POINTS + 2),
        "ring": lambda: RingCache(2, tiny_model.config.sliding_window, 4 * POINTS + 2),
    }[kind]()
    output = greedy(tiny_model, condition, return_dict_in_generate=True, **{name: cache})
    assert torch.equal(output.sequences, expected)
    assert output.cache is output.past_key_values and output.cache.self_attention_cache is cache


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_cache_that_holds_a_prompts_beginning_saves_its_pass_and_changes_nothing(tiny_model, condition, name):
    ids = greedy(tiny_model, condition)
    with torch.no_grad():
        first = tiny_model(ids[:, :9], condition_embeds=condition, use_cache=True)
    seen = []
    hook = tiny_model.model.embed_tokens.register_forward_hook(
        lambda module, words, out: seen.append(words[0].shape[1])
    )
    resumed = greedy(tiny_model, condition, inputs=ids[:, :13], **{name: first.cache})
    hook.remove()
    assert torch.equal(resumed, ids) and seen == [4] + [1] * (ids.shape[1] - 14)


def test_a_prompt_may_be_read_in_pieces(tiny_model, condition):
    prompt = greedy(tiny_model, condition)[:, :41]
    seen = []
    hook = tiny_model.model.embed_tokens.register_forward_hook(
        lambda module, words, out: seen.append(words[0].shape[1])
    )
    pieces = greedy(tiny_model, condition, inputs=prompt, prefill_chunk_size=12)
    hook.remove()
    assert seen[:4] == [12, 12, 12, 5] and torch.equal(pieces, greedy(tiny_model, condition))


def test_beams_write_the_same_with_every_cache(tiny_model, condition):
    options = dict(num_beams=3, min_points=4, max_points=4, return_dict_in_generate=True)
    beams = greedy(tiny_model, condition, **options)
    assert beams[CACHE_NAME] is not None and beams.sequences.shape == (2, 18)
    for other in (
        dict(use_cache=False),
        dict(cache_implementation="static"),
        dict(past_key_values=DynamicCache(config=tiny_model.config)),
        dict(cache=DynamicCache(config=tiny_model.config)),
    ):
        assert torch.equal(greedy(tiny_model, condition, **options, **other).sequences, beams.sequences), other


def test_both_names_at_once_and_caches_that_hold_too_much_are_refused(tiny_model, condition):
    cache = DynamicCache(config=tiny_model.config)
    for call in (greedy, lambda model, condition, **options: model(torch.zeros(2, 3, dtype=torch.long), **options)):
        with pytest.raises(ValueError, match="two names of one argument"):
            call(tiny_model, condition, cache=cache, past_key_values=cache)
    output = greedy(tiny_model, condition, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="cache of 81 tokens and a prompt of 1"):
        greedy(tiny_model, condition, cache=output.cache)
    with pytest.raises(ValueError, match="found inputs_embeds"):
        greedy(tiny_model, condition, inputs_embeds=torch.zeros(2, 1, 64))
