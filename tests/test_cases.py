"""Every public part has its row in `cases.py`, so no new part escapes the contracts."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from functools import cache
from types import ModuleType

import pytest
import torch

import cases
import quadric
from quadric.comm.communicator import Communicator
from quadric.comm.compression import Compressor
from quadric.comm.message import Message
from quadric.linalg.krylov import Conjugation
from quadric.linalg.operator import LinearOperator
from quadric.linalg.pairs import PairSelection
from quadric.linalg.solver import KrylovSolver
from quadric.linalg.truncation import Truncation
from quadric.loss.loss import Loss
from quadric.model.acoustic import AcousticModel
from quadric.optim.blocks import Block
from quadric.optim.damping import Damping
from quadric.optim.descent import Descent
from quadric.optim.length import Length
from quadric.optim.precondition import Preconditioner
from quadric.optim.sampling import Sampler
from quadric.optim.search import Search

TABLES = {
    Communicator: cases.COMMUNICATORS,
    Compressor: cases.COMPRESSORS,
    Message: cases.MESSAGES,
    LinearOperator: cases.OPERATORS,
    KrylovSolver: cases.SOLVERS,
    Conjugation: cases.CONJUGATIONS,
    PairSelection: cases.PAIR_SELECTIONS,
    Loss: cases.LOSSES,
    AcousticModel: cases.MODELS,
    Damping: cases.DAMPINGS,
    Sampler: cases.SAMPLERS,
    Search: cases.SEARCHES,
    Descent: cases.DESCENTS,
    Preconditioner: cases.PRECONDITIONERS,
    Truncation: cases.TRUNCATIONS,
    Block: cases.BLOCKS,
    Length: cases.LENGTHS,
}


@cache
def modules() -> tuple[ModuleType, ...]:
    """All modules of quadric that can be imported here."""

    def walk() -> Iterator[ModuleType]:
        for info in pkgutil.walk_packages(quadric.__path__, "quadric."):
            try:
                yield importlib.import_module(info.name)
            except ModuleNotFoundError as error:
                if (error.name or "").startswith("quadric"):
                    raise  # an extra may be absent, a module of ours may not
            except SystemExit:  # how the command line answers to an absent extra
                continue

    return tuple(walk())


def public_subclasses(base: type) -> set[type]:
    return {
        found
        for module in modules()
        for name, found in inspect.getmembers(module, inspect.isclass)
        if found.__module__ == module.__name__
        and issubclass(found, base)
        and not inspect.isabstract(found)
        and found is not base
        and not name.startswith("_")
    }


@pytest.mark.parametrize("base", TABLES, ids=lambda base: base.__name__)
def test_every_public_subclass_has_a_row(base: type) -> None:
    missing = {found.__qualname__ for found in public_subclasses(base) - set(TABLES[base])}
    assert not missing, f"add a row to tests/cases.py for {sorted(missing)}"


def test_every_named_optimiser_has_a_row() -> None:
    """A public function of `quadric.optim` that returns an optimiser, or a public optimiser class."""
    optim = [m for m in modules() if m.__name__.startswith("quadric.optim.")]
    named = {
        name
        for module in optim
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__
        and not name.startswith("_")
        and _returns_optimiser(module, function.__annotations__.get("return"))
    }
    classes = {found.__name__ for found in public_subclasses(torch.optim.Optimizer)} - {"SecondOrder", "BlockDiagonal"}
    assert {"hessian_free"} <= named
    covered = {row.split(",")[0] for row in (*cases.OPTIMISERS, *cases.FIRST_ORDER, *cases.FAMILY)}
    assert named | classes <= covered, f"add a row to tests/cases.py for {sorted((named | classes) - covered)}"


def _returns_optimiser(module: ModuleType, annotation: object) -> bool:
    found = getattr(module, annotation, None) if isinstance(annotation, str) else annotation
    return inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)


def test_the_walk_sees_a_missing_row() -> None:
    assert {cls.__name__ for cls in public_subclasses(LinearOperator)} >= {"Identity", "Sum", "CurvatureOperator"}
