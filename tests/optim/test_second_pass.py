from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from quadric.optim.second_pass import SecondPass


class Drawing(nn.Module):
    """Remembers what its dropout has let through."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.batch, self.dropout = nn.Linear(3, 40), nn.BatchNorm1d(40), nn.Dropout(0.5)
        self.let_through: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.batch(self.linear(x)))
        self.let_through.append(x.detach() != 0)
        return x


@pytest.mark.parametrize("zero", ["none", "in place", "not at all"])
def test_the_second_pass_is_the_first_and_leaves_no_trace(zero: str) -> None:
    torch.manual_seed(0)
    model = Drawing()

    def closure() -> Tensor:
        if zero != "not at all":
            model.zero_grad(set_to_none=zero == "none")
        value = model(torch.arange(12.0).view(4, 3)).square().sum()
        value.backward()
        return value.detach()

    second_pass = SecondPass(model, closure)
    first = closure()
    gradients = [p.grad for p in model.parameters()]
    kept, buffers = [g.clone() for g in gradients], {k: b.clone() for k, b in model.named_buffers()}
    numbers = torch.get_rng_state()
    for moved in (False, True):
        if moved:
            with torch.no_grad():
                model.linear.weight.mul_(2)
        with torch.no_grad():
            value = second_pass()
        assert torch.equal(model.let_through[-1], model.let_through[0])
        assert torch.equal(value, first) is not moved
        for p, g, k in zip(model.parameters(), gradients, kept, strict=True):
            assert p.grad is g and torch.equal(g, k)
        assert all(torch.equal(b, buffers[k]) for k, b in model.named_buffers())
        assert torch.equal(torch.get_rng_state(), numbers)
    closure()
    assert not torch.equal(model.let_through[-1], model.let_through[0])


def test_after_an_error_all_is_as_before() -> None:
    model = nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    gradient = model.weight.grad

    def closure() -> None:
        model.zero_grad()
        torch.rand(1)
        raise RuntimeError("out of data")

    second_pass, numbers = SecondPass(model, closure), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="out of data"):
        second_pass()
    assert model.weight.grad is gradient and torch.equal(torch.get_rng_state(), numbers)
