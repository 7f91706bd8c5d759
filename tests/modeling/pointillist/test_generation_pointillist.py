"""generate(): every cache writes the same tokens, within the window and beyond it; features, guidance, streaming, limits."""

from contextlib import nullcontext
from threading import Thread

import pytest
import torch
from transformers import CompileConfig, DynamicCache, LogitsProcessor, StaticCache
from without_host import WithoutHost

from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer
from modeling import PointillistConfig, PointillistForCausalLM, PointStreamer, RingCache
from modeling.pointillist.generation_pointillist import PointLoop
from modeling.pointillist.generation_sampling import TokenSampler

pytestmark = pytest.mark.newest
POINTS = 20  # 81 tokens: two and a half windows of 32


def greedy(model, condition, **options):
    return model.generate(condition_embeds=condition, do_sample=False, min_points=POINTS, max_points=POINTS, **options)


def test_every_cache_writes_the_same_tokens_far_beyond_the_window(tiny_model, condition):
    ring = greedy(tiny_model, condition)
    assert ring.shape == (2, 4 * POINTS + 2)
    static_cache = StaticCache(config=tiny_model.config, max_cache_len=4 * POINTS + 2)
    for name, options in {
        "no cache": dict(use_cache=False),
        "dynamic": dict(cache_implementation="dynamic"),
        "transformers' dynamic": dict(past_key_values=DynamicCache(config=tiny_model.config)),
        "static ring": dict(cache_implementation="static"),
        "transformers' static": dict(past_key_values=static_cache),
        "transformers' own loop": dict(return_dict_in_generate=True, output_scores=True),
    }.items():
        other = greedy(tiny_model, condition, **options)
        other = other if isinstance(other, torch.Tensor) else other.sequences
        assert torch.equal(other, ring), name


@pytest.mark.slow
def test_a_compiled_static_cache_writes_the_same_tokens(tiny_model, condition):
    compile_config = CompileConfig(fullgraph=True, backend="inductor", mode="default")
    compile_config._compile_all_devices = True
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = greedy(tiny_model, condition, cache_implementation="static", compile_config=compile_config)
    assert counters["stats"]["unique_graphs"] == 1, "one graph a step would be slower than none"
    assert torch.equal(compiled, greedy(tiny_model, condition))


def test_a_compiled_step_has_no_inputs_that_count_and_serves_sequences_of_every_length(tiny_model, condition):
    """A number of the host is a new input at each step, and CUDA graphs are recorded for every value of it."""
    inputs = []

    def backend(graph, examples):
        inputs.append([type(node.meta.get("example_value")) for node in graph.graph.find_nodes(op="placeholder")])
        return graph

    compile_config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    compile_config._compile_all_devices = True
    torch._dynamo.reset()
    for points in (POINTS, POINTS + 3):
        limits = dict(do_sample=False, min_points=points, max_points=points, condition_embeds=condition[:1])
        cache = RingCache(tiny_model.config.num_hidden_layers, tiny_model.config.sliding_window, static=True)
        compiled = tiny_model.generate(past_key_values=cache, compile_config=compile_config, **limits)
        assert torch.equal(compiled, tiny_model.generate(**limits))
        assert cache.get_seq_length() == compiled.shape[1] - 1
    assert len(inputs) == 1 and torch.SymInt not in inputs[0]


@pytest.mark.parametrize("cache", ["static", None])
def test_no_step_waits_for_the_host(cache, tiny_model, condition, monkeypatch):
    sample, step, called = TokenSampler.__call__, PointLoop.next, set()

    def watched_sample(self, *arguments):
        with WithoutHost() if self in called else nullcontext():  # the first call makes what all read
            called.add(self)
            return sample(self, *arguments)

    def watched_step(self, *arguments):
        with WithoutHost():
            return step(self, *arguments)

    monkeypatch.setattr(TokenSampler, "__call__", watched_sample)
    monkeypatch.setattr(PointLoop, "next", watched_step)
    bos, pad = tiny_model.config.bos_token_id, tiny_model.config.pad_token_id
    options = dict(top_k=9, temperature=0.8, max_points_per_face=3, guidance_scale=2.0, max_points=10)
    for prompts in ([[bos], [bos]], [[bos, 1], [pad, bos]]):
        ids = torch.tensor(prompts)
        tiny_model.generate(ids, condition_embeds=condition, cache_implementation=cache, **options)


def test_sequences_of_one_condition_share_its_keys_and_are_those_of_copies(tiny_model, condition):
    """Sampled, with every cache, with guidance, and from more prompts than conditions."""
    copies = condition.repeat_interleave(3, 0)
    prompts = torch.randint(0, 16, (6, 5), generator=torch.Generator().manual_seed(4))
    prompts[:, 0] = tiny_model.config.bos_token_id
    prompts[:, 4] += 16
    for options in (
        dict(cache_implementation="dynamic"),
        dict(cache_implementation="static"),
        dict(use_cache=False),
        dict(guidance_scale=3.0),
        dict(condition_mask=torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 1, 1]])),
        dict(window_policy="reprefill"),
    ):
        options = dict(min_points=POINTS, max_points=POINTS, output_point_features=True, sorted_points=False, **options)
        mask = {name: value.repeat_interleave(3, 0) for name, value in options.items() if name == "condition_mask"}
        results = []
        for given in (
            dict(condition_embeds=copies, **mask),
            dict(condition_embeds=condition, num_return_sequences=3),
            dict(inputs=prompts, condition_embeds=copies, **mask),
            dict(inputs=prompts, condition_embeds=condition),
        ):
            torch.manual_seed(3)
            results.append(tiny_model.generate(**options | given))
        for copied, shared in (results[:2], results[2:]):
            assert torch.equal(shared.sequences, copied.sequences), options
            torch.testing.assert_close(shared.point_features, copied.point_features, atol=5e-5, rtol=1e-4)
            if shared.past_key_values is not None:
                rows = [len(each.past_key_values.cross_attention_cache.layers[1].keys) for each in (shared, copied)]
                assert rows == ([4, 12] if "guidance_scale" in options else [2, 6])
    beams = dict(num_beams=2, do_sample=False, max_new_tokens=24)
    expected = tiny_model.generate(prompts, condition_embeds=copies, **beams)
    assert torch.equal(tiny_model.generate(prompts, condition_embeds=condition, **beams), expected)


@torch.no_grad()
def test_tokens_beyond_the_window_are_those_of_a_banded_full_forward(tiny_model, condition):
    ids = greedy(tiny_model, condition)
    full = tiny_model(ids, condition_embeds=condition)  # one pass, banded by the window
    result = greedy(tiny_model, condition, output_point_features=True)
    assert torch.equal(result.sequences, ids)
    predicting = full.last_hidden_state[:, : 4 * POINTS].unflatten(1, (POINTS, 4))
    torch.testing.assert_close(result.point_features, predicting, atol=2e-5, rtol=1e-4)


def test_sampling_is_reproducible_and_rows_end_where_they_like(tiny_model, condition):
    condition = condition.repeat(4, 1, 1)
    torch.manual_seed(3)
    result = tiny_model.generate(condition_embeds=condition, max_points=50, output_point_features=True)
    torch.manual_seed(3)
    assert torch.equal(tiny_model.generate(condition_embeds=condition, max_points=50), result.sequences)
    assert len(set(result.num_points.tolist())) > 1
    for row, count, features in zip(result.sequences, result.num_points, result.point_features):
        assert row[0] == tiny_model.config.bos_token_id
        assert (row[1 : 1 + 4 * count] < tiny_model.config.bos_token_id).all()
        assert row[1 + 4 * count] == tiny_model.config.eos_token_id
        assert (row[2 + 4 * count :] == tiny_model.config.pad_token_id).all()
        assert features[:count].abs().sum((-1, -2)).min() > 0 and not features[count:].any()


def test_a_row_is_the_same_alone_and_in_a_batch_of_prompts_of_other_lengths(tiny_model, condition):
    config = tiny_model.config
    prompts = [[config.bos_token_id], [config.bos_token_id, 1, 2, 3, 20, 4, 5, 6, 21]]
    width = max(map(len, prompts))
    padded = torch.tensor([[config.pad_token_id] * (width - len(p)) + p for p in prompts])
    options = dict(do_sample=False, min_points=POINTS, max_points=POINTS)
    together = tiny_model.generate(padded, condition_embeds=condition, **options)
    static = tiny_model.generate(padded, condition_embeds=condition, cache_implementation="static", **options)
    assert torch.equal(together, static)
    for i, prompt in enumerate(prompts):
        alone = tiny_model.generate(torch.tensor([prompt]), condition_embeds=condition[i : i + 1], **options)[0]
        written = together[i][width - len(prompt) :][: len(alone)]
        assert torch.equal(written, alone)


def test_guidance_follows_the_formula_and_one_is_off(tiny_model, condition):
    assert torch.equal(greedy(tiny_model, condition, guidance_scale=1.0), greedy(tiny_model, condition))
    guided = greedy(tiny_model, condition, guidance_scale=3.0)

    class Combine(LogitsProcessor):
        """The formula by a separate unconditional pass over the whole prefix."""

        def __call__(self, input_ids, scores):
            empty = tiny_model(input_ids).logits[:, -1].float()
            return empty + 3.0 * (scores - empty)

    expected = tiny_model.generate(
        condition_embeds=condition, do_sample=False, grammar=False, max_new_tokens=24, logits_processor=[Combine()]
    )
    ours = tiny_model.generate(
        condition_embeds=condition, do_sample=False, grammar=False, max_new_tokens=24, guidance_scale=3.0
    )
    assert torch.equal(ours, expected)
    assert not torch.equal(guided, greedy(tiny_model, condition))


@torch.no_grad()
def test_reprefilling_restarts_from_the_newest_half_window(tiny_model, condition):
    window = tiny_model.config.sliding_window
    ids = greedy(tiny_model, condition, window_policy="reprefill")
    assert not torch.equal(ids, greedy(tiny_model, condition))
    # Replay: the context grows to the window, then falls back to half of it (cut at a whole point), and so on.
    begin = 0
    result = greedy(tiny_model, condition, window_policy="reprefill", output_point_features=True)
    features = result.point_features.flatten(1, 2)
    for length in range(1, 4 * POINTS + 1):
        if length - begin > window:
            begin = length - window // 2
            begin -= begin % 4  # bos or a face, as in training
        hidden = tiny_model(ids[:, begin:length], condition_embeds=condition).last_hidden_state[:, -1]
        torch.testing.assert_close(features[:, length - 1], hidden, atol=2e-5, rtol=1e-4)


def test_points_arrive_while_they_are_written(tiny_model, condition):
    tokenizer = GaussianTokenizer(n_bins=16, n_faces=20, bounds=[[0, 0, 0], [1, 1, 1]])
    streamer = PointStreamer(tokenizer, timeout=10)
    thread = Thread(target=greedy, args=(tiny_model, condition[:1]), kwargs=dict(streamer=streamer))
    thread.start()
    points = list(streamer)
    thread.join()
    whole = tokenizer.decode(greedy(tiny_model, condition[:1])[0])
    assert len(points) == POINTS
    for i, point in enumerate(points):
        assert (point["positions"] == whole["positions"][i]).all() and (point["faces"] == whole["faces"][i]).all()


def test_streaming_a_batch_is_refused(tiny_model, condition):
    streamer = PointStreamer(GaussianTokenizer(n_bins=16, n_faces=20), callback=lambda point: None)
    with pytest.raises(ValueError, match="one sequence"):
        greedy(tiny_model, condition, streamer=streamer)


def test_limits_hold(tiny_model, condition):
    torch.manual_seed(0)
    ids = tiny_model.generate(condition_embeds=condition, min_points=10, max_points=12, max_points_per_face=1)
    for row in ids:
        tokens = row[row < tiny_model.config.bos_token_id].tolist()
        faces = tokens[3::4]
        assert len(faces) <= 12 and len(set(faces)) == len(faces)
        # Fewer only where nothing can follow: x, y and z at their last level.
        assert len(faces) >= 10 or tokens[-4:-1] == [tiny_model.config.n_bins - 1] * 3


def test_what_does_not_combine_is_said(tiny_model, condition):
    with pytest.raises(ValueError, match="do not combine"):
        greedy(tiny_model, condition, num_beams=2, guidance_scale=2.0)
    with pytest.raises(ValueError, match="window_policy"):
        greedy(tiny_model, condition, window_policy="forget")
    with pytest.raises(ValueError, match="begin with bos"):
        tiny_model.generate(torch.tensor([[1, 2]]), condition_embeds=condition[:1])
    bos, eos = tiny_model.config.bos_token_id, tiny_model.config.eos_token_id
    with pytest.raises(ValueError, match="cut the end token off"):
        tiny_model.generate(torch.tensor([[bos, 1, 1, 1, 17, eos]]), condition_embeds=condition[:1])
    with pytest.raises(ValueError, match="grammar=True"):
        greedy(tiny_model, condition, grammar=False)
    with pytest.raises(ValueError, match="min_points instead"):
        greedy(tiny_model, condition, min_new_tokens=9)
    prompt = torch.tensor([[bos, *[1, 1, 1, 17] * 3, 1]])
    with pytest.raises(ValueError, match=r"prompt of 4 points, but max_points=3 .* give max_points of 4 or more"):
        tiny_model.generate(prompt, condition_embeds=condition[:1], max_points=3)
    assert tiny_model.generate(prompt[:, :-1], condition_embeds=condition[:1], max_points=3).tolist() == [
        [*prompt[0, :-1].tolist(), eos]
    ]
    with pytest.raises(ValueError, match="use_cache=True"):
        greedy(tiny_model, condition, window_policy="reprefill", use_cache=False)
    with pytest.raises(ValueError, match="whole points"):
        tiny_model.generate(
            torch.tensor([[tiny_model.config.bos_token_id, 1]]),
            condition_embeds=condition[:1],
            output_point_features=True,
        )


def test_a_cache_that_is_too_short_says_so(tiny_model, condition):
    cache = RingCache(2, window=32, max_length=8)
    with pytest.raises(ValueError, match="made for 8 tokens"):
        greedy(tiny_model, condition, past_key_values=cache)


@torch.no_grad()
def test_a_ring_takes_a_prompt_in_pieces(tiny_model, condition):
    """A prompt of any length, in pieces larger and smaller than the window, then single tokens."""
    ids = torch.randint(0, 36, (2, 110), generator=torch.Generator().manual_seed(0))
    expected = tiny_model(ids, condition_embeds=condition).logits
    cache = RingCache(2, window=32)
    pieces, logits = [5, 1, 40, 20, 1, 1, 35, 1, 6], []
    outputs_cache = cache
    for piece in ids.split(pieces, dim=1):
        outputs = tiny_model(piece, condition_embeds=condition, past_key_values=outputs_cache, use_cache=True)
        outputs_cache = outputs.past_key_values
        logits.append(outputs.logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.slow
def test_the_papers_model_trains_a_step_and_generates_on_a_cpu():
    config = PointillistConfig(use_vision_encoder=False, use_point_encoder=False)
    torch.manual_seed(0)
    model = PointillistForCausalLM(config)
    assert 425.7e6 < model.num_decoder_parameters() < 425.8e6
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(0, config.bos_token_id, (1, 2048))
    condition = torch.randn(1, 257, 1024)
    before = model(ids, labels=ids, condition_embeds=condition).loss
    before.backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        after = model(ids, labels=ids, condition_embeds=condition).loss
    assert after < before
    written = model.eval().generate(condition_embeds=condition, min_points=16, max_points=16)
    assert written.shape == (1, 66)
    assert int((written < config.bos_token_id).sum()) == 64
