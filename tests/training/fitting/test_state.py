"""The optimizer of a fit and its checkpoints."""

import pytest
import torch

from training.fitting.density_control import Edit, GaussianParams
from training.fitting.state import FitState, differences, saved_identity

RATES = {
    "positions": 0.01,
    "log_scales": 0.02,
    "quats": 0.03,
    "opacities": 0.05,
    "sh_dc": 0.1,
    "sh_rest": 0.2,
    "head.expr": 0.3,
}


def begin(count: int = 5) -> FitState:
    random = torch.Generator().manual_seed(0)
    gaussians = GaussianParams(
        positions=torch.randn(count, 3, generator=random),
        log_scales=torch.randn(count, 3, generator=random),
        quats=torch.randn(count, 4, generator=random),
        opacities=torch.randn(count, generator=random),
        sh_dc=torch.randn(count, 1, 3, generator=random),
        sh_rest=torch.randn(count, 3, 3, generator=random),
        faces=torch.arange(count),
    )
    return FitState.begin(gaussians, {"expr": torch.randn(2, 4, generator=random)})


def optimize(state: FitState, steps: int, seed: int = 1) -> None:
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for value in state.parameters().values():
            value.grad = torch.randn(value.shape, generator=random)
        state.adam_step(RATES)
        state.iteration += 1


def test_steps_are_those_of_torch_adam():
    state = begin()
    twins = {name: value.clone().requires_grad_() for name, value in state.parameters().items()}
    adam = torch.optim.Adam([{"params": [twin], "lr": RATES[name]} for name, twin in twins.items()], eps=1e-15)
    random = torch.Generator().manual_seed(2)
    for _ in range(7):
        for name, value in state.parameters().items():
            value.grad = torch.randn(value.shape, generator=random)
            twins[name].grad = value.grad.clone()
        state.adam_step(RATES)
        state.iteration += 1
        adam.step()
    for name, value in state.parameters().items():
        torch.testing.assert_close(value, twins[name].detach(), rtol=1e-5, atol=1e-6)


def test_moments_follow_their_rows_and_new_rows_begin_at_zero():
    state = begin()
    optimize(state, 3)
    before = {name: [moment.clone() for moment in pair] for name, pair in state.moments.items()}
    state.gradient_sums += 1
    origin = torch.tensor([4, 1, -1, -1])
    state.apply(Edit(state.gaussians.map(lambda value: value[[4, 1, 0, 0]]), torch.zeros(4), origin))
    for name in state.gaussians.values():
        for now, then in zip(state.moments[name], before[name]):
            assert torch.equal(now[:2], then[[4, 1]]) and not now[2:].any()
    assert all(torch.equal(now, then) for now, then in zip(state.moments["head.expr"], before["head.expr"]))
    assert state.gradient_sums.tolist() == state.views.tolist() == state.radii.tolist() == [0] * 4
    optimize(state, 1)  # goes on with the new rows


def test_lowered_opacities_stay_where_they_are_put():
    state = begin()
    optimize(state, 2)
    low = torch.logit(torch.tensor(0.01)).item()
    state.gaussians.opacities[0] = low - 1
    state.lower_opacities(0.01)
    assert state.gaussians.opacities[0] == low - 1 and state.gaussians.opacities[1:].tolist() == pytest.approx(
        [low] * 4
    )
    assert not any(moment.any() for moment in state.moments["opacities"])


def test_a_checkpoint_restores_everything_and_goes_on_alike(tmp_path):
    state = begin()
    optimize(state, 3)
    state.gradient_sums += torch.arange(5)
    state.save(tmp_path / "checkpoint", {"settings": {"a": 1}})
    assert saved_identity(tmp_path / "checkpoint") == {"settings": {"a": 1}}
    again = FitState.load(tmp_path / "checkpoint", torch.device("cpu"))
    assert again.iteration == 3 and torch.equal(again.gradient_sums, state.gradient_sums)
    for each in (state, again):
        optimize(each, 2, seed=5)
    for name, value in state.parameters().items():
        assert torch.equal(value, again.parameters()[name])
        assert all(torch.equal(a, b) for a, b in zip(state.moments[name], again.moments[name]))


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path):
    path = tmp_path / "checkpoint"
    begin().save(path, {})
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"checkpoint: not a whole checkpoint"):
        FitState.load(path, torch.device("cpu"))
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"checkpoint: not a whole checkpoint"):
        saved_identity(path)


def test_differences_name_what_disagrees_at_any_depth():
    found = differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5})
    assert found == "c is 2, asked for 4, d is 3, asked for None, e is None, asked for 5"
