"""8-bit weights by torchao: what is rounded and how far, what generation writes, and that it survives its file."""

import pytest
import torch
from tiny_model import TINY
from transformers import CompileConfig

from modeling import PointillistConfig, PointillistForCausalLM
from modeling.generate import quantization

pytest.importorskip("torchao")
LEVELS = {"token": {}, "point": dict(level="point", mesh_aware_faces=True, sliding_window=8)}
OPTIONS = dict(min_points=12, max_points=12, do_sample=False)


@pytest.fixture(params=LEVELS)
def saved(request, tmp_path):
    torch.manual_seed(0)
    model = PointillistForCausalLM(PointillistConfig(**TINY | LEVELS[request.param], initializer_range=0.2)).eval()
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


@pytest.fixture
def inputs(condition):
    normals = torch.nn.functional.normalize(torch.randn(2, TINY["n_faces"], 3), dim=-1)
    return {
        "condition_embeds": condition,
        "face_centers": TINY["n_bins"] * torch.rand(2, TINY["n_faces"], 3),
        "face_normals": normals,
    }


@pytest.mark.parametrize(
    "device", ["cpu", "cuda"]
)  # for which quantization is made: where it runs does not matter here
def test_linear_layers_of_the_decoder_are_rounded_by_half_a_step_and_nothing_else_is(saved, device):
    model, folder = saved
    loaded = dict(
        PointillistForCausalLM.from_pretrained(folder, quantization_config=quantization(device)).named_parameters()
    )
    linear = {
        f"model.{name}.weight" for name, layer in model.model.named_modules() if isinstance(layer, torch.nn.Linear)
    }
    linear = {name for name in linear if "embed_tokens" not in name}
    assert len(linear) == 10 * model.config.num_hidden_layers
    for name, parameter in model.named_parameters():
        found = loaded[name]
        if name not in linear:
            assert type(found) is torch.nn.Parameter and torch.equal(found, parameter), name
            continue
        assert found.qdata.dtype == torch.int8
        step = parameter.abs().amax(1, keepdim=True) / 127
        error = (found.dequantize() - parameter).abs()
        assert (error <= 0.51 * step).all() and (error > 0.2 * step).any(), name


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_it_predicts_nearly_the_same_and_writes_the_same_from_its_file_and_compiled(saved, inputs, device, tmp_path):
    model, folder = saved
    quantized = PointillistForCausalLM.from_pretrained(folder, quantization_config=quantization(device)).eval()
    ids = model.generate(**inputs, **OPTIONS)
    with torch.no_grad():
        expected, found = (each(ids, labels=ids, **inputs).loss for each in (model, quantized))
    assert found != expected
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0)
    written = quantized.generate(**inputs, **OPTIONS)
    quantized.save_pretrained(tmp_path / "quantized")
    again = PointillistForCausalLM.from_pretrained(tmp_path / "quantized").eval()
    assert torch.equal(again.generate(**inputs, **OPTIONS), written)
    compile_config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compile_config._compile_all_devices = True
    torch._dynamo.reset()
    # Not those of the growing cache: activations are rounded, and what a mask changes in the last bit may change a step.
    static = quantized.generate(**inputs, **OPTIONS, cache_implementation="static")
    compiled = dict(cache_implementation="static", compile_config=compile_config)
    assert torch.equal(quantized.generate(**inputs, **OPTIONS, **compiled), static)
