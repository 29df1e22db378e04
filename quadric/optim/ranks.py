"""What the ranks of the block-diagonal family do together: statistics of all calls, and inverses dealt out by cost."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quadric.comm.communicator import Communicator
from quadric.optim.blocks import Block, Call, Numbers, positions
from quadric.optim.capture import examples
from quadric.optim.layers import Layer


class Tally(NamedTuple):
    """How many calls there are of a layer, of how many examples at how many positions: all ranks', over their number.

    What is normalised by these on each rank has the mean over the ranks that one rank with all the calls would make.
    """

    calls: float
    examples: float
    positions: float


def tally(layers: Sequence[Layer], calls: Mapping[Layer, Sequence[Call]], communicator: Communicator) -> list[Tally]:
    """Of each layer."""
    own = [calls.get(layer, ()) for layer in layers]
    found = [[len(c), examples(c), positions(c, layer)] for layer, c in zip(layers, own, strict=True)]
    if communicator.size > 1 and layers:
        counts = torch.tensor(found, dtype=torch.float64, device=layers[0].weight.device)
        communicator.sum_(counts)
        return [Tally(*row) for row in (counts / communicator.size).tolist()]
    return [Tally(*row) for row in found]


def mean_over_ranks(numbers: Numbers, communicator: Communicator) -> None:
    """Replaces a block's statistics by the means of all ranks'."""
    if communicator.size > 1:
        statistics = [x for name, x in numbers.items() if name.startswith("statistics_")]
        communicator.sum_(*statistics)
        torch._foreach_div_(statistics, communicator.size)


def deal(work: Sequence[float], ranks: int) -> list[int]:
    """The rank of each piece of work: the dearest first, each to who has least so far (Graham, 1969).

    >>> deal([5.0, 4.0, 3.0, 3.0, 3.0], 2)
    [0, 1, 1, 0, 1]
    """
    loads, owners = [0.0] * ranks, [0] * len(work)
    for piece in sorted(range(len(work)), key=lambda piece: -work[piece]):
        owners[piece] = loads.index(min(loads))
        loads[owners[piece]] += work[piece]
    return owners


def refresh(
    blocks: Sequence[Block], state: MutableMapping[Tensor, Numbers], damping: float, communicator: Communicator
) -> list[Block]:
    """Makes the inverses of blocks anew, each on one rank, from which the others have them.

    Returns:
        The blocks whose inverses are not finite. They keep those they had.
    """
    owners = deal([block.work for block in blocks], communicator.size)
    failed = [
        owner == communicator.rank and not _made(block, state[block.layer.weight], damping)
        for block, owner in zip(blocks, owners, strict=True)
    ]
    if communicator.size > 1 and blocks:
        flags = torch.tensor(failed, dtype=torch.float64, device=blocks[0].layer.weight.device)
        communicator.sum_(flags)
        failed = [flag > 0 for flag in flags.tolist()]
        for block, owner, wrong in zip(blocks, owners, failed, strict=True):
            for inverse in () if wrong else block.inverses(state[block.layer.weight]):
                communicator.broadcast_(inverse, owner)
    return [block for block, wrong in zip(blocks, failed, strict=True) if wrong]


def _made(block: Block, numbers: Numbers, damping: float) -> bool:
    """Whether the inverses are finite; if not, the numbers are as they were."""
    before = dict(numbers)
    try:
        block.refresh(numbers, damping)
        made = [x for name, x in numbers.items() if name.startswith("inverse_") and x is not before.get(name)]
        if not made or bool(torch.stack([x.sum() for x in made]).isfinite().all()):
            return True
    except torch.linalg.LinAlgError:
        pass
    numbers.clear()
    numbers.update(before)
    return False
