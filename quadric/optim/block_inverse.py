"""The inverses of the block-diagonal family as preconditioners of conjugate gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from quadric.linalg.operator import LinearOperator
from quadric.linalg.pairs import Pair
from quadric.linalg.solver import ChangingInverse
from quadric.objective.objective import Data, Objective
from quadric.optim.blocks import Block, Numbers, Seen
from quadric.optim.capture import Capture, examples
from quadric.optim.descent import LocalModel
from quadric.optim.kfac import KroneckerFactors
from quadric.optim.layers import Layer, find_layers, gradients_kept
from quadric.optim.precondition import Preconditioner
from quadric.optim.ranks import mean_over_ranks
from quadric.space import ParameterSpace


class BlockInverse(LinearOperator):
    """v -> P v with the inverse P of a block for each layer.

    Args:
        space: whose parameters the blocks' layers have, each once.
        blocks: of these layers.
        numbers: of each block, with its inverses.
    """

    symmetric = True

    def __init__(self, space: ParameterSpace, blocks: list[Block], numbers: list[Numbers]) -> None:
        self.size = space.size
        self.space, self.blocks, self.numbers = space, blocks, numbers
        self._places = {id(p): place for place, p in enumerate(space.parameters)}

    def apply(self, v: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        pieces = self.space.split(v)
        for block, numbers in zip(self.blocks, self.numbers, strict=True):
            places = [self._places[id(p)] for p in block.layer.parameters]
            for place, step in zip(places, block.apply(numbers, [pieces[place] for place in places]), strict=True):
                pieces[place] = step.to(v.dtype)
        return self.space.flatten(pieces)


@dataclass(frozen=True)
class BlockCurvature(Preconditioner):
    """M = F + lambda I with the blocks F of one of the family, on the curvature's data of every step.

    Attributes:
        block: gives a layer its block; of those that ask for the calls of modules, such as `KroneckerFactors`: the
            outer product of one batch's gradient says little of the curvature.
        floor: the least lambda, as a share of a layer's mean curvature.
    """

    block: Callable[[Layer], Block] = field(default_factory=KroneckerFactors)
    floor: float = 1e-4

    def __post_init__(self) -> None:
        if not self.floor > 0:
            raise ValueError(f"floor={self.floor}: must be positive, or M is singular where lambda is 0")

    def operator(
        self, objective: Objective, local: LocalModel, pairs: tuple[Pair, ...], damping: float
    ) -> LinearOperator | ChangingInverse | None:
        with objective.stopwatch.on("preconditioner"), torch.no_grad():
            blocks = [self.block(layer) for layer in find_layers(objective.model, objective.space.parameters)]
            numbers: list[Numbers] = [{} for _ in blocks]
            self._observe(objective, blocks, numbers)
            for block, own in zip(blocks, numbers, strict=True):
                mean = float(block.mean_curvature(own))
                block.refresh(own, max(self.floor, damping / mean) if mean > 0 else max(self.floor, damping))
        return BlockInverse(objective.space, blocks, numbers)

    def _observe(self, objective: Objective, blocks: list[Block], numbers: list[Numbers]) -> None:
        """The statistics of all micro-batches, of all ranks, as those of one.

        With the gradients G_b of micro-batches, of the mean loss over F frames, the squares of frames are F sum_b G_b^2
        where they are independent; this serves blocks that are made of gradients.
        """
        parameters, ranks = objective.space.parameters, objective.communicator
        count, scale = objective.batches(Data.CURVATURE), objective.curvature_frames * ranks.size
        capture = Capture(objective.model, [block.layer for block in blocks if block.wants_calls], lambda: False)
        try:
            with capture.recording(), gradients_kept(parameters):
                for seen, _ in enumerate(objective.passes(Data.CURVATURE)):
                    calls = capture.take()
                    for place, block in enumerate(blocks):
                        found = calls.get(block.layer, ())
                        if block.wants_calls and not found and block.otherwise is not None:
                            blocks[place] = block = block.otherwise
                        scaled = [g * math.sqrt(scale * count) for g in block.layer.gradient]
                        n = examples(found)
                        shown = Seen(scaled, found, n, scale=math.sqrt(n / (scale * count)))
                        block.observe(numbers[place], shown, 1 / (seen + 1))
                    for p in parameters:
                        p.grad = None
        finally:
            capture.close()
        for block, own in zip(blocks, numbers, strict=True):
            if not count:
                block.observe(own, Seen([torch.zeros_like(p) for p in block.layer.parameters]), 1.0)
            mean_over_ranks(own, ranks)
