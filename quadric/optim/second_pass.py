"""The same pass once more after a step, and what blocks learn from the difference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quadric.comm.communicator import Communicator
from quadric.optim.blocks import Block, Call, Numbers, SecondLook, Seen
from quadric.optim.layers import Gradient, Layer, gradients_kept
from quadric.optim.ranks import tally

Calls = Mapping[Layer, Sequence[Call]]
Looks = dict[SecondLook, list[Tensor]]
"""What blocks have seen of a pass."""


class SecondPass:
    """A closure's second call, after that which makes a step's gradient. Make it before the first.

    Random layers draw the numbers of the first call again. Gradients, buffers (such as the statistics of batch
    normalisation) and the numbers that are drawn afterwards are those that the first call has left.

    Args:
        model: whose parameters and buffers these are.
        closure: zeroes the gradients and computes them anew, or only adds to them.
    """

    def __init__(self, model: nn.Module, closure: Callable[[], Any]) -> None:
        self.model, self.closure = model, closure
        self._devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
        self._states = self._numbers()

    def _numbers(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._devices)]

    def _draw_from(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self._devices, states[1:], strict=True):
            torch.cuda.set_rng_state(state, device)

    def __call__(self) -> Any:
        """What the closure returns now."""
        buffers = list(self.model.buffers())
        held, states = [b.clone() for b in buffers], self._numbers()
        self._draw_from(self._states)
        try:
            with torch.enable_grad(), gradients_kept(self.model.parameters()):
                return self.closure()
        finally:
            self._draw_from(states)
            with torch.no_grad():
                for b, kept in zip(buffers, held, strict=True):
                    b.copy_(kept)


def look(shown: Sequence[tuple[Block, Gradient]], calls: Calls, scale: float, communicator: Communicator) -> Looks:
    """Of the pass that makes the gradient, those that it has called, on one rank at least; ``scale`` is `Seen`'s."""
    looking = [(block, gradient) for block, gradient in shown if isinstance(block, SecondLook)]
    tallies = tally([block.layer for block, _ in looking], calls, communicator)
    return {
        block: block.look(Seen(gradient, calls.get(block.layer, ()), scale=scale))
        for (block, gradient), heard in zip(looking, tallies, strict=True)
        if heard.calls
    }


def compare(
    before: Looks,
    calls: Calls,
    state: Mapping[Tensor, Numbers],
    share: float,
    damping: float,
    scale: float,
    communicator: Communicator,
) -> None:
    """Has blocks learn from the calls of the second pass, and from what they saw of the first; all ranks the same."""
    after = {block: block.look(Seen((), calls.get(block.layer, ()), scale=scale)) for block in before}
    if communicator.size > 1:
        sums = [x for looks in (before, after) for found in looks.values() for x in found]
        communicator.sum_(*sums)
        torch._foreach_div_(sums, communicator.size)
    for block, found in before.items():
        block.learn(state[block.layer.weight], found, after[block], share, damping)
