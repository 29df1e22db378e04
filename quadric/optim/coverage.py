"""Which block each layer of a model has, and the memory that blocks take."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from quadric.comm.communicator import Communicator
from quadric.objective.memory import free
from quadric.optim.blocks import Block, statistics_type

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Coverage:
    """Which block a layer has got, and why.

    Attributes:
        parameters: their names.
        block: the kind of the block.
        matrices: how many of what size.
        why: what the layer is, and where the block is not of the method's first choice, the reason.
        bytes: of statistics and inverses.
        of_calls: whether the statistics are of calls of the layer's module; without them another block takes its place.
    """

    parameters: tuple[str, ...]
    block: str
    matrices: str
    why: str
    bytes: int
    of_calls: bool

    def __str__(self) -> str:
        return f"{', '.join(self.parameters)}: {self.block}, {self.matrices} ({self.why})"


def coverage_of(model: nn.Module, blocks: Sequence[Block]) -> tuple[Coverage, ...]:
    """The record of each block."""
    names = {id(p): name for name, p in model.named_parameters()}
    return tuple(
        Coverage(
            tuple(names[id(p)] for p in block.layer.parameters),
            type(block).__name__,
            block.shape,
            f"{type(block.layer.module).__name__}: {block.layer.kind.value}"
            + (f"; {block.reason}" if block.reason else ""),
            _bytes(block),
            block.wants_calls,
        )
        for block in blocks
    )


def check_memory(new: Sequence[Block], communicator: Communicator) -> None:
    """Refuses blocks that there is no room for."""
    largest = max(new, key=_bytes, default=None)
    if largest is None:
        return
    needed, left = sum(map(_bytes, new)), free(largest.layer.weight.device, communicator.size)
    if needed > left:
        raise ValueError(
            f"the blocks take {needed / 2**30:.1f} GiB, {left / 2**30:.1f} GiB are free; {largest.layer.name} "
            f"alone takes {_bytes(largest) / 2**30:.1f} for {largest.shape}: choose averaged blocks or a smaller "
            "largest=, or leave it out of params"
        )


def check_present(model: nn.Module, blocks: Sequence[Block]) -> None:
    """Refuses blocks of parameters that are the model's no longer."""
    present = {id(p) for p in model.parameters()}
    for block in blocks:
        for p in block.layer.parameters:
            if id(p) not in present:
                raise ValueError(
                    f"{block.layer.name} is no longer a parameter of the model: build the optimiser anew after "
                    "changing a model"
                )


def _bytes(block: Block) -> int:
    return block.elements * statistics_type(block.layer.weight).itemsize


def tell_left_out(model: nn.Module, blocks: Sequence[Block]) -> bool:
    """Warns of parameters that have a gradient and no block; whether there are any."""
    known = {id(p) for block in blocks for p in block.layer.parameters}
    names = [name for name, p in model.named_parameters() if p.grad is not None and p.numel() and id(p) not in known]
    if names:
        logger.warning(
            "%s and %d more stay as they are: they were frozen when the optimiser was made; "
            "add_param_group() takes them",
            names[0],
            len(names) - 1,
        )
    return bool(names)


def described(blocks: Sequence[Block]) -> list[str]:
    """Each block in words, by which `check_state` knows it again."""
    return [f"{type(block).__name__}, {block.shape}" for block in blocks]


def check_state(state: Mapping[str, Any], blocks: Sequence[Block]) -> None:
    """Refuses a state that is not of such blocks.

    Raises:
        ValueError: it is of another optimiser, or another model.
    """
    groups = state.get("param_groups") or [{}]
    theirs, ours = groups[0].get("blocks"), described(blocks)
    if theirs is None:
        raise ValueError("state_dict is not of an optimiser of blocks: load what the same optimiser has saved")
    if theirs != ours:
        pairs = zip((*theirs, *[None] * len(ours)), (*ours, *[None] * len(theirs)), strict=False)
        first = next((a, b) for a, b in pairs if a != b)
        raise ValueError(
            f"state_dict has the block {first[0]!r} where this optimiser has {first[1]!r}: load the state of the same "
            "method with the same options, on the same model"
        )
