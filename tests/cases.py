"""One row for every part that others build on: the tables the contract tests run over.

A new public subclass of an abstract base, or a new optimiser, needs a row here; `test_cases.py` says so when it is
missing. A row is a name and a function that builds the thing afresh.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quadric.comm.collective import Collective
from quadric.comm.communicator import Communicator, Solo, Timed
from quadric.comm.compression import AdaComp, CLTk, Compressor, HalfPrecision, LowRank
from quadric.comm.message import Factors, Halves, Message, Signs, Sparse
from quadric.lattice.automaton import Automaton
from quadric.linalg import truncation
from quadric.linalg.krylov import ConjugateGradient, Conjugation, FlexibleCG, MinRes, Notay, PolakRibiere
from quadric.linalg.lbfgs import LBFGSInverse
from quadric.linalg.operator import Diagonal, Identity, LinearOperator, Matrix, Scaled, Shifted, Sum
from quadric.linalg.pairs import LastPairs, Pair, PairSelection, SpreadPairs
from quadric.linalg.solver import KrylovSolver
from quadric.linalg.truncation import Truncation
from quadric.loss.full_sum import FullSum, FullSumTarget
from quadric.loss.loss import Bernoulli, CrossEntropy, Loss, SquaredError
from quadric.loss.sequence import MMI, MPE, SMBR
from quadric.loss.sequence_loss import SequenceLoss
from quadric.loss.sequence_target import OutputCurvature, Teacher
from quadric.model.acoustic import DNN, TDNN, AcousticModel
from quadric.model.recurrent import LSTM, RNN
from quadric.objective.curvature import CurvatureOperator
from quadric.objective.objective import Objective
from quadric.optim.averaged import AveragedSGD, averaged_sgd
from quadric.optim.block_diagonal import BlockDiagonal
from quadric.optim.block_inverse import BlockCurvature, BlockInverse
from quadric.optim.blocks import Block, Seen
from quadric.optim.contraction import Flattening, Tensors
from quadric.optim.damping import AfterRejection, Damping, Fixed, LevenbergMarquardt
from quadric.optim.descent import NGHF, Descent, NaturalGradient, NewtonCG
from quadric.optim.kbfgs import KroneckerPairs, KroneckerPairsPatches, QuasiNewton, kbfgs, kbfgs_l
from quadric.optim.kfac import Kronecker, KroneckerFactors, KroneckerPatches, kfac
from quadric.optim.layers import Kind, Layer, find_layers
from quadric.optim.length import KLClip, Length, Natural, UnitEntries
from quadric.optim.mini_block import (
    Averaged,
    Entries,
    ExampleAveraged,
    ExampleKernels,
    ExampleRows,
    Kernels,
    MiniBlocks,
    Rows,
    mini_block_fisher,
)
from quadric.optim.precondition import LBFGS, FisherDiagonal, Preconditioner, SharedCounts
from quadric.optim.sampling import FixedSizes, GeometricSizes, Sampler, VarianceTested
from quadric.optim.search import Backtracking, BestIterate, Search
from quadric.optim.second_order import SecondOrder, hessian_free, natural_gradient, nghf
from quadric.optim.shampoo import Shampoo, shampoo
from quadric.optim.tnt import TNT, tnt
from quadric.space import ParameterSpace
from quadric.stopwatch import Stopwatch
from reference import dense
from reference.sequence import PDFS, utterance

MicroBatch = tuple[Tensor, Any]


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64 that no other draw disturbs."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def padded_classes(frames: int, classes: int, kept: list[int]) -> Tensor:
    """Class indices [B, T]; utterance b keeps its first ``kept[b]`` frames, the rest is padding."""
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(classes, (len(kept), frames), generator=generator)
    return torch.where(torch.arange(frames) < torch.tensor(kept)[:, None], target, -1)


# Operators: how to build one, and its matrix.


@dataclass(frozen=True)
class OperatorCase:
    build: Callable[[], tuple[LinearOperator, Tensor]]


def _matrix() -> tuple[LinearOperator, Tensor]:
    return Matrix(draw(5, 5)), draw(5, 5)


def _shifted() -> tuple[LinearOperator, Tensor]:
    matrix = dense.random_spd(5)
    return Shifted(Matrix(matrix), 0.7), matrix + 0.7 * torch.eye(5, dtype=matrix.dtype)


def _sum() -> tuple[LinearOperator, Tensor]:
    left, right = draw(5, 5), dense.random_spd(5)
    return Sum(Matrix(left), Matrix(right)), left + right


def curvature_pairs(A: Tensor, count: int, seed: int = 0) -> list[Pair]:
    """Pairs (s, A s) along random directions."""
    directions = draw(count, len(A), seed=seed)
    return [Pair(step, s, A @ s) for step, s in enumerate(directions, start=1)]


def _lbfgs() -> tuple[LinearOperator, Tensor]:
    pairs = curvature_pairs(dense.random_spd(5), 3)
    H0 = torch.diag(draw(5).abs() + 0.1)
    return LBFGSInverse(pairs, 5, H0=Matrix(H0)), dense.bfgs_inverse(H0, [(p.s, p.y) for p in pairs])


def _gauss_newton() -> tuple[LinearOperator, Tensor]:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    loss, data = CrossEntropy(), [(draw(2, 4, 3), padded_classes(4, 3, [4, 2])), (draw(5, 3), torch.arange(5) % 3)]
    theta = 0.5 * draw(ParameterSpace(model).size, seed=2)
    return Objective(model, loss, data).curvature(theta), dense.gauss_newton(model, loss, data, theta)


def _block_inverse() -> tuple[LinearOperator, Tensor]:
    """Of two layers in one space, with the inverses in each other's order: those of a matrix and of a vector."""
    model = nn.Sequential(nn.LayerNorm(2, bias=False), nn.Linear(2, 2, bias=False)).double()
    layers = find_layers(model, model.parameters())
    blocks, gradient = [MiniBlocks()(layer) for layer in layers], draw(6)
    numbers: list[dict[str, Tensor]] = [{}, {}]
    space = ParameterSpace(model)
    for block, own, piece in zip(blocks, numbers, space.split(gradient), strict=True):
        block.observe(own, Seen([piece]), 1.0)
        block.refresh(own, 0.5)
    diagonal = 1 / (gradient[:2] ** 2 + 0.5 * (gradient[:2] ** 2).mean())
    D = gradient[2:].view(2, 2)
    S = D.T @ D / 2
    P = torch.linalg.inv(S + 0.5 * S.trace() / 2 * torch.eye(2, dtype=S.dtype))
    return BlockInverse(space, blocks[::-1], numbers[::-1]), torch.block_diag(torch.diag(diagonal), P, P)


OPERATORS: dict[type[LinearOperator], OperatorCase] = {
    Identity: OperatorCase(lambda: (Identity(5), torch.eye(5, dtype=torch.float64))),
    Diagonal: OperatorCase(lambda: (Diagonal(draw(5)), torch.diag(draw(5)))),
    Matrix: OperatorCase(_matrix),
    Scaled: OperatorCase(lambda: (Scaled(Matrix(dense.random_spd(5)), -2.5), -2.5 * dense.random_spd(5))),
    Shifted: OperatorCase(_shifted),
    Sum: OperatorCase(_sum),
    LBFGSInverse: OperatorCase(_lbfgs),
    CurvatureOperator: OperatorCase(_gauss_newton),
    BlockInverse: OperatorCase(_block_inverse),
}


# Solvers: a factory of the steps and the rule; and what they are assembled from.

SolverCase = Callable[..., KrylovSolver]

SOLVERS: dict[type[KrylovSolver], SolverCase] = {
    ConjugateGradient: ConjugateGradient,
    FlexibleCG: FlexibleCG,
    MinRes: MinRes,
}
CONJUGATIONS: dict[type[Conjugation], Callable[[], Conjugation]] = {
    PolakRibiere: PolakRibiere,
    Notay: lambda: Notay(3),
}
PAIR_SELECTIONS: dict[type[PairSelection], Callable[[int], PairSelection]] = {
    LastPairs: LastPairs,
    SpreadPairs: SpreadPairs,
}
SAMPLERS: dict[type[Sampler], Callable[[], Sampler]] = {
    FixedSizes: lambda: FixedSizes(1000, 100),
    GeometricSizes: lambda: GeometricSizes(200, 20),
    VarianceTested: lambda: VarianceTested(200),
}
TRUNCATIONS: dict[type[Truncation], Callable[[], Truncation]] = {
    truncation.RelativeProgress: truncation.RelativeProgress,
    truncation.Residual: truncation.Residual,
    truncation.FixedIterations: truncation.FixedIterations,
}


# Communicators: a job of one, which meets in a folder.

COMMUNICATORS: dict[type[Communicator], Callable[[Path], Communicator]] = {
    Solo: lambda folder: Solo(),
    Timed: lambda folder: Timed(Solo(), Stopwatch(lambda: 0.0)),
    Collective: lambda folder: Collective(0, 1, f"file://{folder}/meeting", timeout=5),
}


# Compressed gradients: compressors of vectors of one length, and messages.

COMPRESSED = 40
COMPRESSORS: dict[type[Compressor], Callable[[], Compressor]] = {
    AdaComp: lambda: AdaComp([23, 17], [5, 40]),
    CLTk: lambda: CLTk(0.3),
    HalfPrecision: lambda: HalfPrecision(torch.float16),
    LowRank: lambda: LowRank([(4, 2, 4), (8,)], 1),
}
MESSAGES: dict[type[Message], Callable[[], Message]] = {
    Sparse: lambda: Sparse(7, np.array([1, 3], np.int32), np.array([0.5, -2.0], np.float32)),
    Signs: lambda: Signs(
        *(np.array(layers, np.int32) for layers in ([7, 2], [4, 2])),
        np.array([2.0, 0.5], np.float32),
        *(np.array(places, np.uint8) for places in ([1, 2, 1], [3, 0, 2, 1], [0b01010000])),
    ),
    Halves: lambda: Halves("bfloat16", np.array([0x3F80, 0xC000, 0], np.uint16)),
    Factors: lambda: Factors(np.array([[3, 4, 1], [1, 2, 0]], np.int32), np.arange(1, 10, dtype=np.float32)),
}


# Losses: the loss, an output, a target, which frames [B, T] count, and of what kind its curvature is.


@dataclass(frozen=True)
class LossCase:
    loss: Callable[[], Loss]
    output: Tensor
    target: Any
    counts: Tensor
    curvature: bool = True
    semidefinite: bool = True


def _chain(pdfs: list[int]) -> Automaton:
    """The pdfs in order, each for one frame or more."""
    arcs = [(s, s + step, pdf, -0.7) for s, pdf in enumerate(pdfs) for step in (0, 1)]
    return Automaton.from_arcs(arcs, final={len(pdfs): 0.0})


def _first(frames: int, kept: list[int]) -> Tensor:
    return torch.arange(frames) < torch.tensor(kept)[:, None]


def _sequence(cls: type[SequenceLoss], **options: Any) -> LossCase:
    """On two lattices, in which every frame can be right or wrong."""

    def loss() -> SequenceLoss:
        prior = torch.log_softmax(draw(PDFS, seed=4), 0)
        return cls(prior, scale=0.6, smoothing=0.1, anchor=0.2, curvature=OutputCurvature.LATTICE, **options)

    def teacher(frames: int) -> Teacher:
        """Of all pdfs: the Fisher matrix of its divergence is then the Hessian."""
        return np.tile(np.arange(PDFS, dtype=np.int32), (frames, 1)), np.full((frames, PDFS), 1 / PDFS)

    made = [utterance(80, 6), utterance(46, 4)]
    target = [loss().target(lattice, path, teacher=teacher(len(path))) for lattice, path, _ in made]
    return LossCase(loss, draw(2, 7, PDFS), target, _first(7, [6, 4]), semidefinite=cls is MMI)


LOSSES: dict[type[Loss], LossCase] = {
    CrossEntropy: LossCase(CrossEntropy, draw(2, 5, 4), padded_classes(5, 4, [5, 3]), _first(5, [5, 3])),
    Bernoulli: LossCase(Bernoulli, draw(2, 3, 2), draw(2, 3, 2, seed=3).sigmoid(), _first(3, [3, 3])),
    SquaredError: LossCase(SquaredError, draw(2, 3, 2), draw(2, 3, 2, seed=3), _first(3, [3, 3])),
    FullSum: LossCase(
        lambda: FullSum(torch.log_softmax(draw(4, seed=4), 0), scale=0.6, prior_scale=0.5),
        draw(2, 6, 4),
        [FullSumTarget(_chain([0, 2, 1]), 6), FullSumTarget(_chain([3, 0]), 4)],
        _first(6, [6, 4]),
        curvature=False,
    ),
    MMI: _sequence(MMI, boost=0.5),
    MPE: _sequence(MPE, silence_phones=(0,)),
    SMBR: _sequence(SMBR),
}


# Acoustic models: 3 features, 4 classes.

MODELS: dict[type[AcousticModel], Callable[..., AcousticModel]] = {
    TDNN: partial(TDNN, 3, 4, [5, 6, 5], offsets=((-2, 0, 1), (-1, 2), (0,))),
    DNN: partial(DNN, 3, 4, [5, 6], context=(2, 1)),
    RNN: partial(RNN, 3, 4, [5, 4], feed_forward=[6], window=(3, 2)),
    LSTM: partial(LSTM, 3, 4, [3, 4], feed_forward=[5], window=(2, 3)),
}


# Optimisers: a factory of the parameters or groups.

DAMPINGS: dict[type[Damping], Callable[[], Damping]] = {
    LevenbergMarquardt: LevenbergMarquardt,
    Fixed: lambda: Fixed(0.1),
    AfterRejection: AfterRejection,
}
SEARCHES: dict[type[Search], Callable[[], Search]] = {Backtracking: Backtracking, BestIterate: BestIterate}
DESCENTS: dict[type[Descent], Callable[[], Descent]] = {
    NewtonCG: NewtonCG,
    NaturalGradient: NaturalGradient,
    NGHF: NGHF,
}
PRECONDITIONERS: dict[type[Preconditioner], Callable[[], Preconditioner]] = {
    LBFGS: LBFGS,
    FisherDiagonal: FisherDiagonal,
    SharedCounts: SharedCounts,
    BlockCurvature: BlockCurvature,
}


def _undamped(params: Iterable[Any]) -> SecondOrder:
    descent = NewtonCG(ConjugateGradient(30, truncation.Residual(1e-4)), momentum=0.0)
    return SecondOrder(params, descent=descent, search=Backtracking(), damping=Fixed(1e-3))


OPTIMISERS: dict[str, Callable[[Iterable[Any]], torch.optim.Optimizer]] = {
    "hessian_free": hessian_free,
    "hessian_free, eager": lambda params: hessian_free(params, damping=10.0, max_steps=5, momentum=0.5),
    "newton_cg, fixed damping": _undamped,
    "hessian_free, L-BFGS": lambda params: hessian_free(params, damping=0.1, max_steps=8, preconditioner=LBFGS()),
    "hessian_free, diagonal": lambda params: hessian_free(params, damping=0.1, preconditioner=FisherDiagonal()),
    "natural_gradient": natural_gradient,
    "nghf": nghf,
    "hessian_free, KFAC": lambda params: hessian_free(
        params, damping=0.1, max_steps=8, preconditioner=BlockCurvature()
    ),
    "nghf, shared counts": lambda params: nghf(params, preconditioner=SharedCounts()),
}


# First-order optimisers: a factory of the parameters or groups; the rate is 0.2.

FIRST_ORDER: dict[str, Callable[[Iterable[Any]], torch.optim.Optimizer]] = {
    "averaged_sgd": partial(averaged_sgd, lr=0.2),
    "averaged_sgd, late": partial(averaged_sgd, lr=0.2, a=0.5, power=2 / 3, start=3, every=2, weight_decay=0.01),
    "AveragedSGD, constant": partial(AveragedSGD, lr=0.2, a=0.0),
}


# The block-diagonal family: a factory of the model; blocks by the layer they are of.

FAMILY: dict[str, Callable[..., BlockDiagonal]] = {
    "mini_block_fisher": mini_block_fisher,
    "mini_block_fisher, a block a row": partial(mini_block_fisher, blocks=MiniBlocks(averaged=False, largest=5)),
    "mini_block_fisher, root": partial(mini_block_fisher, blocks=MiniBlocks(exponent=-0.5), length=KLClip()),
    "mini_block_fisher, per example": partial(mini_block_fisher, blocks=MiniBlocks(per_example=True)),
    "mini_block_fisher, a block a row, per example": partial(
        mini_block_fisher, blocks=MiniBlocks(averaged=False, per_example=True)
    ),
    "kfac": kfac,
    "kbfgs": kbfgs,
    "kbfgs_l": kbfgs_l,
    "kbfgs_l, few pairs": partial(kbfgs_l, blocks=QuasiNewton(memory=2, start=0)),
    "kfac, reduce": partial(kfac, factors=KroneckerFactors(sharing="reduce")),
    "shampoo": shampoo,
    "shampoo, small factors": partial(shampoo, exponent=-1.0, tensors=Tensors(largest=4, vectors=3)),
    "tnt": tnt,
    "tnt, bias in the matrix": partial(tnt, tensors=Tensors(Flattening.POSITIONS, joined=True)),
}


def _layer(module: nn.Module, kind: Kind) -> Layer:
    return Layer("weight", kind, module, module.weight, getattr(module, "bias", None))  # type: ignore[arg-type]


BLOCKS: dict[type[Block], Callable[[], Block]] = {
    Averaged: lambda: MiniBlocks(largest=4)(_layer(nn.Linear(6, 3).double(), Kind.MATRIX)),
    Rows: lambda: MiniBlocks(averaged=False, largest=4)(_layer(nn.Linear(6, 3).double(), Kind.MATRIX)),
    Kernels: lambda: MiniBlocks()(_layer(nn.Conv2d(2, 3, 2).double(), Kind.KERNELS)),
    Kronecker: lambda: KroneckerFactors()(_layer(nn.Linear(6, 3).double(), Kind.MATRIX)),
    KroneckerPatches: lambda: KroneckerFactors()(_layer(nn.Conv2d(2, 3, 2).double(), Kind.KERNELS)),
    ExampleAveraged: lambda: MiniBlocks(per_example=True)(_layer(nn.Linear(6, 3).double(), Kind.MATRIX)),
    ExampleRows: lambda: MiniBlocks(False, per_example=True)(_layer(nn.Linear(6, 3).double(), Kind.MATRIX)),
    ExampleKernels: lambda: MiniBlocks(per_example=True)(_layer(nn.Conv2d(2, 3, 2).double(), Kind.KERNELS)),
    KroneckerPairs: lambda: QuasiNewton()(_layer(nn.Linear(6, 3).double(), Kind.MATRIX)),
    KroneckerPairsPatches: lambda: QuasiNewton()(_layer(nn.Conv2d(2, 3, 2).double(), Kind.KERNELS)),
    Entries: lambda: MiniBlocks()(_layer(nn.LayerNorm(4).double(), Kind.OTHER)),
    Shampoo: lambda: Shampoo(_layer(nn.Conv2d(2, 3, 2).double(), Kind.KERNELS), Tensors(largest=3, vectors=2)),
    TNT: lambda: TNT(_layer(nn.Linear(6, 3).double(), Kind.MATRIX), Tensors(joined=True)),
}
LENGTHS: dict[type[Length], Callable[[], Length]] = {Natural: Natural, KLClip: KLClip, UnitEntries: UnitEntries}
