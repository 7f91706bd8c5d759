"""The optimizer of a fit and its checkpoints."""

import pytest
import torch

from training.fitting.density_control import Edit, GaussianParams
from training.fitting.state import MOMENTS, FitState, differences, saved_identity

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


class PlainAdam:
    """Adam (Kingma & Ba 2015, algorithm 1) on one value in float64, with rows that come and go."""

    def __init__(self, value: torch.Tensor, rate: float):
        self.value, self.rate, self.steps = value.double(), rate, 0
        self.mean, self.square = torch.zeros_like(self.value), torch.zeros_like(self.value)

    def step(self, gradient: torch.Tensor) -> None:
        self.steps += 1
        self.mean = 0.9 * self.mean + 0.1 * gradient
        self.square = 0.999 * self.square + 0.001 * gradient**2
        mean, square = self.mean / (1 - 0.9**self.steps), self.square / (1 - 0.999**self.steps)
        self.value = self.value - self.rate * mean / (square.sqrt() + 1e-15)

    def replace_rows(self, value: torch.Tensor, origin: list[int]) -> None:
        self.value = value.double()
        for name in ("mean", "square"):
            moment = getattr(self, name)
            rows = [moment[row] if row >= 0 else torch.zeros_like(moment[0]) for row in origin]
            setattr(self, name, torch.stack(rows))


def test_steps_are_those_of_adam_also_after_rows_were_removed_and_added():
    state = begin()
    twins = {name: PlainAdam(value, RATES[name]) for name, value in state.parameters().items()}
    random = torch.Generator().manual_seed(2)
    for edit in (None, [4, 1, -1, -1], [0, 3, 2, -1, -1, -1]):
        if edit is not None:
            source = [max(row, 0) for row in edit]
            changed = state.gaussians.map(lambda value, source=source: value.detach()[source])
            state.apply(Edit(changed, torch.zeros(len(edit)), torch.tensor(edit)))
            for name, value in changed.values().items():
                twins[name].replace_rows(value, edit)
        for _ in range(4):
            for name, value in state.parameters().items():
                value.grad = torch.randn(value.shape, generator=random)
                twins[name].step(value.grad.double())
            state.adam_step(RATES)
    for name, value in state.parameters().items():
        torch.testing.assert_close(value.double(), twins[name].value, rtol=1e-5, atol=1e-6)


def moments(state: FitState, name: str) -> list[torch.Tensor]:
    return [state.adam.state[state.parameters()[name]][key] for key in MOMENTS]


def test_moments_follow_their_rows_and_new_rows_begin_at_zero():
    state = begin()
    optimize(state, 3)
    before = {name: [moment.clone() for moment in moments(state, name)] for name in state.parameters()}
    state.gradient_sums += 1
    origin = torch.tensor([4, 1, -1, -1])
    state.apply(Edit(state.gaussians.map(lambda value: value[[4, 1, 0, 0]]), torch.zeros(4), origin))
    for name in state.gaussians.values():
        for now, then in zip(moments(state, name), before[name]):
            assert torch.equal(now[:2], then[[4, 1]]) and not now[2:].any()
    assert all(torch.equal(now, then) for now, then in zip(moments(state, "head.expr"), before["head.expr"]))
    assert state.gradient_sums.tolist() == state.views.tolist() == state.radii.tolist() == [0] * 4
    optimize(state, 1)  # continues with the new rows


def test_lowered_opacities_stay_where_they_are_put():
    state = begin()
    optimize(state, 2)
    low = torch.logit(torch.tensor(0.01)).item()
    state.gaussians.opacities[0] = low - 1
    state.lower_opacities(0.01)
    assert state.gaussians.opacities[0] == low - 1 and state.gaussians.opacities[1:].tolist() == pytest.approx(
        [low] * 4
    )
    assert not any(moment.any() for moment in moments(state, "opacities"))


def test_a_checkpoint_restores_everything_and_continues_alike(tmp_path):
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
        assert all(torch.equal(a, b) for a, b in zip(moments(state, name), moments(again, name)))


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path):
    path = tmp_path / "checkpoint"
    begin().save(path, {})
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"checkpoint: not a complete checkpoint"):
        FitState.load(path, torch.device("cpu"))
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"checkpoint: not a complete checkpoint"):
        saved_identity(path)


def test_differences_name_what_disagrees_at_any_depth():
    found = differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5})
    assert found == "c is 2, asked for 4, d is 3, asked for None, e is None, asked for 5"
