"""level="point": what it predicts, writes and refuses, with and without mesh-aware faces, in several orders, with both heads."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassClassValidationError
from tiny_model import TINY
from transformers import AutoModel, AutoModelForCausalLM, CompileConfig, DynamicCache, LogitsProcessor
from without_host import WithoutHost

from modeling import PointGrammar, PointillistConfig, PointillistForCausalLM, PointStreamer
from modeling.point_features import point_features
from modeling.pointillist import modeling_points
from modeling.pointillist.configuration_pointillist import FACE_PIXELS
from modeling.pointillist.generation_points import PointLevelLoop
from modeling.ranking import mean_log_likelihood

VARIANTS = [
    (False, "yzxf"),
    (False, "fzyx"),
    (True, "yfxz"),
    (True, "yfzx"),
    (True, "fyzx"),
    (True, "xyzf"),
    (True, "zxfy"),
    (False, "yzxf", "attention"),
    (True, "yfxz", "attention"),
]
POINTS = 20  # two and a half windows of 8
SORTED = (1, 2, 0, 3)


def make_model(mesh_aware, order, slot_head="mlp", **changes):
    torch.manual_seed(0)
    # Large initial weights, so that a wrong mask, position or offset shows.
    config = PointillistConfig(
        **TINY | {"sliding_window": 8, "use_point_encoder": False, "initializer_range": 0.2} | changes,
        level="point", mesh_aware_faces=mesh_aware, slot_order=order, slot_head=slot_head,
    )  # fmt: skip
    return PointillistForCausalLM(config).eval()


@pytest.fixture(params=VARIANTS, ids=lambda variant: "-".join((*variant[1:], *["mesh"] * variant[0])))
def model(request):
    return make_model(*request.param)


@pytest.fixture
def inputs(condition):
    generator = torch.Generator().manual_seed(2)
    normals = F.normalize(torch.randn(2, TINY["n_faces"], 3, generator=generator), dim=-1)
    # Some centers lie outside the box.
    centers = torch.rand(2, TINY["n_faces"], 3, generator=generator) * 20 - 2
    return {"condition_embeds": condition, "face_centers": centers, "face_normals": normals}


@pytest.fixture
def ids(model, inputs):
    torch.manual_seed(1)
    return model.generate(**inputs, min_points=POINTS, max_points=POINTS)


def points_of(ids, count=POINTS):
    return ids[:, 1 : 1 + 4 * count].unflatten(1, (count, 4))


def test_written_points_are_sorted_and_have_each_token_in_its_slot(model, ids):
    config, points = model.config, points_of(ids)
    assert ids.shape == (2, 4 * POINTS + 2) and (ids[:, 0] == config.bos_token_id).all()
    assert (ids[:, -1] == config.eos_token_id).all()
    assert (points[..., :3] < config.n_bins).all() and (points[..., 3] >= config.n_bins).all()
    keys = [[tuple(point[i] for i in SORTED) for point in row] for row in points.tolist()]
    assert all(row == sorted(row) for row in keys)


def test_every_cache_writes_the_same_points_far_beyond_the_window(model, inputs):
    options = dict(do_sample=False, min_points=POINTS, max_points=POINTS)
    ring = model.generate(**inputs, **options)
    for name, cache in {
        "no cache": dict(use_cache=False),
        "dynamic": dict(cache_implementation="dynamic"),
        "transformers' dynamic": dict(past_key_values=DynamicCache(config=model.config)),
        "static ring": dict(cache_implementation="static"),
        "static ring, prompt": dict(inputs=ring[:, :7], cache_implementation="static"),
        "prompt in pieces": dict(inputs=ring[:, :33], prefill_chunk_size=10),
    }.items():
        assert torch.equal(model.generate(**inputs, **options, **cache), ring), name


def compiled_by(backend):
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    torch._dynamo.reset()
    return dict(cache_implementation="static", compile_config=config)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("variant", [(False, "yzxf"), (True, "yfxz"), (True, "yfxz", "attention")])
def test_a_step_is_one_graph_from_reading_a_point_to_drawing_the_next(variant, do_sample, inputs):
    """A number of the host would be another graph for every value of it; here limits, lengths, prompts and rows' ends differ.

    CUDA graphs are not made where an input is on the CPU or is written to without being static.
    """
    model, graphs = make_model(*variant), []
    compiled = compiled_by(lambda graph, examples: graphs.append(graph) or graph)
    prompt = model.generate(**inputs, do_sample=False, min_points=6, max_points=6)[:, :-1]
    for points, length in ((POINTS, 1), (POINTS + 3, 22), (9, 17), (30, 8)):
        options = dict(do_sample=do_sample, min_points=8, max_points=points, max_points_per_face=4, **inputs)
        options["inputs"] = torch.cat((prompt[:1, :length], prompt[1:, :length].roll(length // 3 * 2, 1)))
        options["inputs"][1, : length // 3 * 2] = model.config.pad_token_id
        if do_sample:
            options |= dict(top_p=0.9, temperature=0.8, guidance_scale=2.0)
        written = []
        for way in ({}, compiled):
            torch.manual_seed(points)
            written.append(model.generate(**options, **way, output_point_features=length == 1))
        if length == 1:
            torch.testing.assert_close(written[0].point_features, written[1].point_features)
            written = [each.sequences for each in written]
        assert torch.equal(*written)
    assert len(graphs) == 1 and ("exponential_" in graphs[0].code) == do_sample and "argmax" in graphs[0].code
    model.generate(**options | dict(top_p=0.8, temperature=0.7, guidance_scale=1.5), **compiled)
    for graph in graphs:
        nodes = graph.graph.find_nodes(op="placeholder")
        assert all(node.meta["example_value"].ndim for node in nodes)  # tensors, and no numbers of the host
        for node in nodes:
            if any(str(user.target).endswith("_") and user.args[0] is node for user in node.users):
                assert node.meta["tensor_dict"]["_dynamo_static_input_type"], node.name


@pytest.mark.slow
def test_a_step_compiled_to_machine_code_writes_the_same_points(inputs):
    model = make_model(True, "yfxz")
    compiled = compiled_by("inductor")
    compiled["compile_config"].options = {"fallback_random": True}
    for do_sample in (False, True):
        options = dict(do_sample=do_sample, min_points=POINTS, max_points=POINTS, **inputs)
        torch.manual_seed(0)
        expected = model.generate(**options)
        torch.manual_seed(0)
        assert torch.equal(model.generate(**options, **compiled), expected)


def test_where_the_caller_has_processors_the_decoder_alone_is_compiled(inputs):
    class NotThatFace(LogitsProcessor):
        def __call__(self, input_ids, scores):
            calls.append(input_ids.shape[1])
            return scores.index_fill(1, torch.tensor([TINY["n_bins"] + 4]), -torch.inf)

    model, calls, graphs = make_model(False, "yzxf"), [], []
    options = dict(min_points=POINTS, max_points=POINTS, logits_processor=[NotThatFace()], **inputs)
    torch.manual_seed(0)
    expected = model.generate(**options)
    torch.manual_seed(0)
    compiled = model.generate(**options, **compiled_by(lambda graph, examples: graphs.append(graph) or graph))
    assert torch.equal(compiled, expected) and len(graphs) == 1 and "argmax" not in graphs[0].code
    assert calls == 2 * [length for length in range(1, 4 * POINTS + 2, 4) for _ in range(4)]


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_no_step_waits_for_the_host(cache, model, inputs, monkeypatch):
    step = PointLevelLoop.next

    def watched(self, *arguments):
        with WithoutHost():
            return step(self, *arguments)

    monkeypatch.setattr(PointLevelLoop, "next", watched)
    options = dict(top_k=9, temperature=0.8, max_points_per_face=3, guidance_scale=2.0, max_points=POINTS)
    model.generate(**inputs, **options, cache_implementation=cache)


@torch.no_grad()
def test_features_of_generation_are_those_of_one_banded_pass(model, inputs, ids):
    torch.manual_seed(1)
    result = model.generate(**inputs, min_points=POINTS, max_points=POINTS, output_point_features=True)
    assert torch.equal(result.sequences, ids) and result.num_points.tolist() == [POINTS, POINTS]
    one_pass = model(ids, **inputs).last_hidden_state[:, : 4 * POINTS].unflatten(1, (POINTS, 4))
    torch.testing.assert_close(result.point_features, one_pass, atol=5e-5, rtol=1e-4)
    for chunk in (4, 18, 1000):
        pieces = point_features(model, ids, **inputs, chunk=chunk)
        torch.testing.assert_close(pieces, one_pass, atol=5e-5, rtol=1e-4)


@torch.no_grad()
def test_a_token_depends_on_earlier_points_and_on_the_slots_spelled_before_it_only(model, inputs, ids):
    config, order = model.config, ["xyzf".index(letter) for letter in model.config.slot_order]
    logits = model(ids, **inputs).logits
    point = 7
    for slot in range(4):
        changed = ids.clone()
        column = 1 + 4 * point + slot
        low = config.n_bins if slot == 3 else 0
        count = config.n_faces if slot == 3 else config.n_bins
        changed[:, column] = low + (ids[:, column] - low + 3) % count
        differs = (model(changed, **inputs).logits - logits).nan_to_num().abs().amax((0, 2)) > 1e-6
        rows = differs[: 4 * POINTS].unflatten(0, (POINTS, 4))  # of point and slot predicted
        assert not rows[:point].any(), "an earlier point saw it"
        later_slots = order[order.index(slot) + 1 :]
        assert [bool(rows[point, each]) for each in range(4)] == [each in later_slots for each in range(4)]
        assert rows[point + 1].all()


@torch.no_grad()
def test_a_point_sees_exactly_its_window(inputs):
    model = make_model(False, "yzxf", num_hidden_layers=1)
    condition = {"condition_embeds": inputs["condition_embeds"]}
    ids = model.generate(**condition, min_points=POINTS, max_points=POINTS)
    hidden = model.model(ids, condition=inputs["condition_embeds"]).last_hidden_state
    changed = ids.clone()
    changed[:, 1 + 4 * 4 + 3] = (
        model.config.n_bins + (ids[:, 1 + 4 * 4 + 3] - model.config.n_bins + 1) % model.config.n_faces
    )
    other = model.model(changed, condition=inputs["condition_embeds"]).last_hidden_state
    seen = (hidden - other).abs().amax((0, 2)) > 1e-6
    assert seen.nonzero().flatten().tolist() == list(range(5, 5 + 8))  # bos, then points: point 4 is position 5


def test_points_of_one_subject_share_its_faces_and_are_those_of_copies(model, inputs, monkeypatch):
    copies = {name: value.repeat_interleave(3, 0) for name, value in inputs.items()}
    limits = dict(min_points=POINTS, max_points=POINTS, output_point_features=True, sorted_points=False)
    subjects = 2 if model.config.mesh_aware_faces else 1
    for options in ({}, dict(guidance_scale=3.0), dict(cache_implementation="static")):
        torch.manual_seed(1)
        expected = model.generate(**copies, **limits, **options)
        torch.manual_seed(1)
        found = model.generate(**inputs, num_return_sequences=3, **limits, **options)
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(found.point_features, expected.point_features, atol=5e-5, rtol=1e-4)
        assert len(found.past_key_values.cross_attention_cache.layers[0].keys) == (
            4 if "guidance_scale" in options else 2
        )
    ids, faces = found.sequences, {name: inputs[name] for name in ("face_centers", "face_normals")}
    assert len(model.model.embed_tokens.faces(**faces).embeds) == subjects
    copied_faces = {name: copies[name] for name in faces}
    for large in (modeling_points.LARGE, 1):
        monkeypatch.setattr(modeling_points, "LARGE", large)
        expected = mean_log_likelihood(model, found, **copied_faces)
        torch.testing.assert_close(mean_log_likelihood(model, found, **faces), expected)
        with torch.no_grad():
            torch.testing.assert_close(model(ids, labels=ids, **inputs).loss, model(ids, labels=ids, **copies).loss)
            logits, expected = model(ids, **inputs).logits, model(ids, **copies).logits
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_loss_is_the_mean_cross_entropy_of_normalized_logits(model, inputs, ids):
    config = model.config
    labels = ids.clone()
    labels[0, 10:30] = -100
    output = model(ids, labels=labels, **inputs)
    logits = model(ids, **inputs).logits[:, :-1]
    assert output.logits is None
    expected = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(output.loss, expected)
    for slot in range(4):
        allowed = logits[:, slot : 4 * POINTS : 4].isfinite().any(1).any(0)
        faces = allowed[config.n_bins : config.bos_token_id]
        assert faces.all() == (slot == 3) and allowed[: config.n_bins].all() == (slot != 3)
    half = model(ids, labels=labels, **inputs, num_items_in_batch=2 * int((labels[:, 1:] != -100).sum())).loss
    torch.testing.assert_close(2 * half, output.loss)


@torch.no_grad()
def test_groups_with_padding_before_bos_and_windows_from_the_middle_predict_the_same(model, inputs, ids):
    logits = model(ids, **inputs).logits
    led = torch.cat((torch.full((2, 3), model.config.pad_token_id), ids), 1)
    led = F.pad(led, (0, -led.shape[1] % 4), value=model.config.pad_token_id)
    torch.testing.assert_close(model(led, **inputs).logits[:, 3 : 3 + 4 * POINTS], logits[:, : 4 * POINTS])
    config = model.config
    middle = make_model(config.mesh_aware_faces, config.slot_order, config.slot_head, num_hidden_layers=1)
    whole = middle(ids, **inputs).logits[:, 4 * 12 : 4 * 16]
    window = middle(ids[:, 1 + 4 * 4 : 1 + 4 * 16], **inputs).logits[:, 4 * 8 - 1 : 4 * 12 - 1]
    torch.testing.assert_close(window, whole, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_scores_of_a_mesh_aware_model_are_those_of_the_formula(inputs):
    """A float64 loop over the faces and offsets, from the weights alone."""
    model = make_model(True, "yfzx").double()
    heads, embed = model.lm_head, model.model.embed_tokens
    centers, normals = inputs["face_centers"].double(), inputs["face_normals"].double()
    faces = embed.faces(centers, normals)
    state, face = torch.randn(2, 1, 64, dtype=torch.float64), torch.tensor([[3], [11]])
    previous_y = torch.tensor([[0], [9]])
    by_face, by_offset, by_step = (
        head.scores(state, faces.embeds, head.origin(faces, face, previous_y))
        for head in (heads.heads[3], heads.heads[2], heads.heads[1])
    )
    for row in range(2):
        for index in range(model.config.n_faces):
            center = centers[row, index] / 8 - 1  # 16 bins
            angles = torch.tensor(
                [[float(c) * torch.pi * 2**k for k in range(4)] for c in center], dtype=torch.float64
            ).flatten()
            described = torch.cat((angles.sin(), angles.cos(), center, normals[row, index]))
            first, last = embed.face_network[0], embed.face_network[2]
            vector = embed.face_rows[index] + last.weight @ F.gelu(first.weight @ described + first.bias) + last.bias
            vector = vector / (vector.square().mean() + 1e-6).sqrt() * embed.face_norm.weight
            # Features are computed in float32; 8 is the root of the width.
            torch.testing.assert_close(by_face[row, 0, index], vector @ state[row, 0] / 8, atol=1e-5, rtol=1e-5)
        bin_of_center = min(max(int(centers[row, face[row, 0], 2].floor()), 0), 15)
        for level in range(16):
            weight = heads.heads[2].weight[level - bin_of_center + 15]
            torch.testing.assert_close(by_offset[row, 0, level], weight @ state[row, 0])
            weight = heads.heads[1].weight[level - int(previous_y[row, 0]) + 15]
            torch.testing.assert_close(by_step[row, 0, level], weight @ state[row, 0])
        torch.testing.assert_close(by_step[row, 0, 16], heads.heads[1].weight[31] @ state[row, 0])  # the end


@torch.no_grad()
def test_states_of_an_attention_head_are_those_of_the_formula():
    """A float64 loop over places and heads, from the weights alone."""
    model = make_model(False, "yzxf", "attention").double()
    heads, block, width = model.lm_head, model.lm_head.attention, 64
    groups = torch.tensor([[[0, 0, 0, 36], [3, 5, 7, 16 + 11], [3, 6, 2, 16 + 4]]])
    hidden = torch.randn(1, 3, width, dtype=torch.float64)
    faces = model.model.embed_tokens.faces(None, None)
    targets = heads.targets(groups.roll(-1, 1), groups)
    states = heads.states(hidden, targets, faces)

    def norm(x, weight):
        return x / (x.square().mean() + 1e-6).sqrt() * weight

    for group, (x, y, z, previous_y) in enumerate([(3, 5, 7, 0), (3, 6, 2, 5)]):
        rows = [heads.heads[1].weight[y - previous_y + 15], heads.heads[2].weight[z], heads.heads[0].weight[x]]
        inputs = [hidden[0, group]]
        inputs += [norm(row, heads.heads[slot].read_norm.weight) for slot, row in zip((1, 2, 0), rows)]
        inputs = [vector + block.places[place] for place, vector in enumerate(inputs)]
        keys = [norm(vector, block.attention_norm.weight) for vector in inputs]
        for place, slot in enumerate((1, 2, 0, 3)):
            mixed = []
            for head in range(4):
                q, k, v = (block.qkv.weight[part * width + head * 16 :][:16] for part in range(3))
                weights = torch.stack([(q @ keys[place]) @ (k @ key) / 4 for key in keys[: place + 1]]).exp()
                mixed.append(sum(w * (v @ key) for w, key in zip(weights / weights.sum(), keys)))
            vector = inputs[place] + block.output.weight @ torch.cat(mixed)
            first, last = block.mlp[0], block.mlp[2]
            between = F.gelu(first.weight @ norm(vector, block.mlp_norm.weight) + first.bias)
            vector = vector + last.weight @ between + last.bias
            torch.testing.assert_close(states[0, group, slot], norm(vector, heads.heads[slot].state_norm.weight))


def test_a_row_is_the_same_alone_and_in_a_batch_of_prompts_of_other_lengths(model, inputs, ids):
    config = model.config
    for lengths in ((1, 13), (9, 6), (3, 8)):  # whole points, and prompts that end within a point
        width = max(lengths)
        padded = torch.full((2, width), config.pad_token_id)
        for row, length in enumerate(lengths):
            padded[row, width - length :] = ids[row, :length]
        options = dict(do_sample=False, min_points=POINTS, max_points=POINTS)
        together = model.generate(padded, **inputs, **options)
        for row, length in enumerate(lengths):
            own = {name: value[row : row + 1] for name, value in inputs.items()}
            alone = model.generate(ids[row : row + 1, :length], **own, **options)[0]
            assert alone[:length].tolist() == ids[row, :length].tolist(), "the prompt was changed"
            found = together[row, width - length :]
            assert torch.equal(found[: len(alone)], alone) and (found[len(alone) :] == config.pad_token_id).all()


def test_guidance_follows_the_formula_and_one_is_off(model, inputs):
    options = dict(do_sample=False, max_points=1, progress=False)
    plain = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, guidance_scale=1.0), plain)
    guided = model.generate(**inputs, **options, guidance_scale=4.0)
    empty = inputs | {"condition_embeds": model.condition_encoder.or_empty(None, 2, None).expand(-1, 5, -1)}
    with torch.no_grad():
        logits = [model(guided, **each).logits[:, :4] for each in (empty, inputs)]
    combined = logits[0] + 4 * (logits[1] - logits[0])
    combined[..., model.config.eos_token_id] = -torch.inf
    assert combined.nan_to_num(-torch.inf).argmax(-1).tolist() == guided[:, 1:5].tolist()


def test_limits_hold_and_rows_end_where_they_like(model, inputs):
    four = {name: value.repeat_interleave(4, 0) for name, value in inputs.items()}
    torch.manual_seed(5)
    result = model.generate(**four, min_points=3, max_points=30, max_points_per_face=2, output_point_features=True)
    assert result.num_points.min() >= 3 and result.num_points.max() <= 30
    for row, count, features in zip(result.sequences, result.num_points.tolist(), result.point_features):
        assert row[1 + 4 * count] == model.config.eos_token_id
        assert (row[2 + 4 * count :] == model.config.pad_token_id).all()
        assert torch.bincount(row[4 : 1 + 4 * count : 4]).max() <= 2
        assert features[:count].abs().sum((-1, -2)).min() > 0 and not features[count:].any()
    faces = {name: four[name] for name in ("face_centers", "face_normals")}
    scores = mean_log_likelihood(model, result, **faces)
    labels = torch.where(result.sequences < model.config.bos_token_id, result.sequences, -100)
    for row in range(8):
        own = {name: value[row : row + 1] for name, value in four.items()}
        with torch.no_grad():
            logits = model(result.sequences[row : row + 1], **own).logits[0, :-1]
        expected = -F.cross_entropy(logits[labels[row, 1:] >= 0], labels[row, 1:][labels[row, 1:] >= 0])
        torch.testing.assert_close(scores[row], expected, atol=1e-4, rtol=1e-4)


def test_a_length_that_cuts_a_point_and_streamed_points(model, inputs, ids):
    one = {name: value[:1] for name, value in inputs.items()}
    options = dict(do_sample=False, min_points=POINTS)
    whole = model.generate(**one, **options, max_points=POINTS)
    assert torch.equal(model.generate(**one, **options, max_new_tokens=22), whole[:, :23])

    class NotThatFace(LogitsProcessor):
        """Forbids one face, in scores over the whole vocabulary."""

        def __call__(self, input_ids, scores):
            assert scores.shape == (1, model.config.vocab_size) and (input_ids[:, 0] == model.config.bos_token_id).all()
            scores[:, model.config.n_bins + 4] = -torch.inf
            return scores

    seen = []

    class Tokenizer:
        bos_token_id = model.config.bos_token_id

        def decode(self, tokens):
            return tuple(tokens)

    streamer = PointStreamer(Tokenizer(), callback=seen.append)
    torch.manual_seed(3)
    free = model.generate(**one, max_points=30, min_points=25, logits_processor=[NotThatFace()], streamer=streamer)
    count = len(seen)
    assert [token for point in seen for token in point] == free[0, 1 : 1 + 4 * count].tolist() and count >= 25
    assert model.config.n_bins + 4 not in free[0].tolist()


def test_reprefilling_restarts_from_the_newest_half_window(model, inputs):
    options = dict(do_sample=False, min_points=POINTS, max_points=POINTS)
    rolling = model.generate(**inputs, **options)
    again = model.generate(**inputs, **options, window_policy="reprefill")
    assert again.shape == rolling.shape and torch.equal(again[:, : 1 + 4 * 7], rolling[:, : 1 + 4 * 7])
    pad = model.config.pad_token_id
    same = F.pad(rolling[:, :13], (8, 0), value=pad)
    different = torch.cat((same[:1], F.pad(rolling[1:, :5], (16, 0), value=pad)))
    for prompt in ({}, dict(inputs=same), dict(inputs=different)):
        options |= prompt | dict(window_policy="reprefill")
        static = model.generate(**inputs, **options, cache_implementation="static")
        assert torch.equal(static, model.generate(**inputs, **options))


@pytest.mark.parametrize("order", ["yfxz", "yfzx", "fyzx", "xyzf", "zxfy"])
def test_the_grammar_of_a_point_is_that_of_brute_force(order):
    """Every slot in every order: a value is allowed exactly if some permitted point has it and what is spelled already."""
    n, faces = 3, 3
    config = PointillistConfig(n_bins=n, n_faces=faces, use_vision_encoder=False, use_point_encoder=False)
    generator = torch.Generator().manual_seed(7)
    everything = list(product(range(n), range(n), range(n), range(faces)))
    for trial in range(40):
        limit = int(torch.randint(1, 4, (), generator=generator)) if trial % 2 else None
        grammar = PointGrammar(config, max_points_per_face=limit, max_points=6)
        previous, points, counts = (0, 0, 0, 0), 0, [0] * faces
        grammar.count(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, dtype=torch.long))
        while points < 7:
            permitted = [
                p
                for p in everything
                if (not points or [p[i] for i in SORTED] >= [previous[i] for i in SORTED])
                and (limit is None or counts[p[3]] < limit) and points < 6
            ]  # fmt: skip
            point, known = torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.bool)
            for place, letter in enumerate(order):
                slot = "xyzf".index(letter)
                last = torch.tensor([previous]), torch.tensor([points])
                allowed = grammar.allowed(slot, place == 0, grammar.room(), *last, point, known)[0]
                if place == 0:
                    assert bool(allowed[-1]) == (points >= 1 or not permitted)
                    allowed = allowed[:-1]
                spelled = [i for i in range(4) if known[0, i]]
                possible = {p[slot] for p in permitted if all(p[i] == point[0, i] for i in spelled)}
                assert set(allowed.nonzero().flatten().tolist()) == possible
                if not possible:
                    break
                # The upper corner of the box is where dead ends would be.
                weights = allowed.float() * 3.0 ** torch.arange(len(allowed))
                point[0, slot] = torch.multinomial(weights, 1, generator=generator)
                known[0, slot] = True
            if not permitted:
                break
            previous, points = tuple(point[0].tolist()), points + 1
            counts[previous[3]] += 1
            grammar.add(point[:, 3], torch.tensor([True]))


def test_gradients_reach_every_parameter_and_large_vocabularies_are_scored_row_by_row(model, inputs, ids, monkeypatch):
    ids = ids.clone()
    model.train()
    model(ids, labels=ids, **inputs, drop_condition=torch.tensor([True, False])).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    unused = [name for name, gradient in gradients.items() if gradient is None or not gradient.abs().sum()]
    assert not [name for name in unused if not name.startswith("condition_encoder.norm")], unused
    model.zero_grad()
    monkeypatch.setattr(modeling_points, "LARGE", 1)
    model(ids, labels=ids, **inputs, drop_condition=torch.tensor([True, False])).loss.backward()
    for name, parameter in model.named_parameters():
        if gradients[name] is not None:
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_degenerate_faces_give_no_nan(inputs):
    model = make_model(True, "yfzx")
    flat = inputs | {"face_centers": torch.zeros(2, 20, 3), "face_normals": torch.zeros(2, 20, 3)}
    ids = model.generate(**flat, min_points=POINTS, max_points=POINTS)
    assert not model(ids, **flat).logits.isnan().any()


def test_a_saved_model_loads_through_auto_classes(model, inputs, ids, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids, **inputs).logits, model(ids, **inputs).logits)
        decoder = AutoModel.from_pretrained(tmp_path)
        faces = {name: inputs[name] for name in ("face_centers", "face_normals")}
        hidden = decoder(ids, condition=inputs["condition_embeds"], **faces).last_hidden_state
    assert hidden.shape == (2, POINTS + 2, 64)  # bos, the points, the end


def test_a_level_that_the_weights_do_not_have_is_refused(tmp_path):
    make_model(True, "yfzx").save_pretrained(tmp_path)
    for changes in (
        dict(level="token", mesh_aware_faces=False, slot_order=None, sliding_window=32),
        dict(slot_order="zyxf"),
        dict(slot_head="attention"),
    ):
        config = PointillistConfig.from_pretrained(tmp_path, **changes)
        with pytest.raises((ValueError, RuntimeError), match=r"the weights lack|ignore_mismatched_sizes"):
            PointillistForCausalLM.from_pretrained(tmp_path, config=config)


def test_what_does_not_work_is_said(inputs, ids):
    model = make_model(True, "yfzx")
    for options in (dict(num_beams=2), dict(output_scores=True, return_dict_in_generate=True)):
        with pytest.raises(ValueError, match='level="token"'):
            model.generate(**inputs, **options)
    with pytest.raises(ValueError, match="mesh_aware_faces: give face_centers"):
        model.generate(condition_embeds=inputs["condition_embeds"])
    with pytest.raises(ValueError, match="give the head model it was trained on"):
        model.generate(**inputs | {"face_centers": torch.zeros(2, 7, 3), "face_normals": torch.zeros(2, 7, 3)})
    with pytest.raises(ValueError, match="reads whole points"):
        model(ids[:, :8], **inputs)
    with pytest.raises(ValueError, match="reads input_ids"):
        model(inputs_embeds=torch.zeros(2, 4, 64), **inputs)
    for message, fields in {
        'mesh_aware_faces, slot_order and slot_head="attention" need level="point"': dict(slot_head="attention"),
        'need level="point"': dict(mesh_aware_faces=True),
        "slot_head is 'rnn', expected": dict(level="point", slot_head="rnn"),
        "letters x, y, z, f": dict(level="point", slot_order="xyz"),
        '"token" or "point"': dict(level="face"),
    }.items():
        with pytest.raises(StrictDataclassClassValidationError, match=message):
            PointillistConfig(**fields)
    with pytest.raises(ValueError, match="whole points"):
        model.generate(ids[:, :7], **inputs, output_point_features=True)


@pytest.fixture
def reading(inputs):
    """A model that reads the portrait at the faces, and its inputs."""
    pixels = torch.rand(2, TINY["n_faces"], FACE_PIXELS, generator=torch.Generator().manual_seed(3))
    return make_model(True, "yfxz", read_portrait=True), inputs | {"face_pixels": pixels}


@torch.no_grad()
def test_a_model_that_reads_the_portrait_at_its_faces_generates_what_it_predicts(reading):
    model, inputs = reading
    torch.manual_seed(0)
    options = dict(min_points=POINTS, max_points=POINTS, output_point_features=True, do_sample=False)
    found = model.generate(**inputs, **options)
    torch.testing.assert_close(
        point_features(model, found.sequences, **inputs), found.point_features, atol=1e-5, rtol=1e-4
    )
    scores = model(found.sequences, **inputs).logits
    other = model(found.sequences, **inputs | {"face_pixels": inputs["face_pixels"].flip(0)}).logits
    assert (scores - other).nan_to_num(posinf=0, neginf=0).abs().max() > 1e-3
    assert set(model.input_names) >= {"face_centers", "face_normals", "face_pixels"}


@torch.no_grad()
def test_sequences_of_one_portrait_share_what_its_faces_read(reading):
    model, inputs = reading
    one = {name: value[:1] for name, value in inputs.items()}
    options = dict(min_points=POINTS, max_points=POINTS, do_sample=False)
    many = model.generate(torch.full((3, 1), model.config.bos_token_id), **one, **options)
    assert (many == model.generate(**one, **options)).all()


def test_a_missing_portrait_at_the_faces_is_said(reading, inputs):
    model, _ = reading
    with pytest.raises(ValueError, match=r"give face_pixels \(2, 20, 74\).*found None"):
        model.generate(**inputs)
    with pytest.raises(ValueError, match=r"found \(2, 20, 4\)"):
        model.generate(**inputs, face_pixels=torch.zeros(2, 20, 4))
    with pytest.raises(StrictDataclassClassValidationError, match="read_portrait needs mesh_aware_faces"):
        PointillistConfig(level="point", read_portrait=True)


def test_what_is_learned_of_a_point_does_not_depend_on_disturbed_ids_of_its_own(model, ids, inputs):
    """The last point is read by no other: its disturbed x and z change nothing if the labels are as before."""
    read = ids[:, : 1 + 4 * POINTS].clone()
    labels = read.clone()
    read[:, -4], read[:, -2] = (read[:, -4] + 3) % model.config.n_bins, (read[:, -2] + 5) % model.config.n_bins
    clean, disturbed = (model(each, labels=labels, **inputs).loss for each in (labels, read))
    torch.testing.assert_close(disturbed, clean)
    read[:, -8] = (read[:, -8] + 3) % model.config.n_bins  # but the point before it is read
    assert (model(read, labels=labels, **inputs).loss - clean).abs() > 1e-6
