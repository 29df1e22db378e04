"""The bans of the architecture beside the floors, read off the source."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "quadric"
FILES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}
CLOCKS = {"time", "datetime"}
DURATION = "datetime.timedelta"
DISTRIBUTED = ("torch.distributed", "torch.nn.parallel", "torch.utils.data.distributed")
PARAMETER_NAMES = {"weight", "bias", "data"}
PARAMETER_LISTS = {"parameters", "named_parameters", "params", "param_groups"}

PROCESSES = tuple(
    f"parallel/{name}.py" for name in ("actors", "cluster", "crew", "engine", "parameter_server", "worker_actor")
)
"""They start processes, configure them by their environment, and wait for them."""

Violations = Iterator[tuple[int, str]]


def imported(node: ast.AST) -> list[str]:
    """Everything a statement imports, in full: ``from torch import distributed`` is torch.distributed."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def under(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def uses_of_distributed(tree: ast.AST) -> Violations:
    """torch.distributed, and the parts of torch elsewhere that call it."""
    for node in ast.walk(tree):
        names = imported(node)
        if isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # for importlib
            names = [node.value]
        for package in DISTRIBUTED:
            if any(under(name, package) for name in names):
                yield node.lineno, f"uses {package}"  # type: ignore[attr-defined]


def uses_of_ray(tree: ast.AST) -> Violations:
    for node in ast.walk(tree):
        if any(under(name, "ray") for name in imported(node)):
            yield node.lineno, "imports ray"  # type: ignore[attr-defined]


def uses_of_the_world(tree: ast.AST) -> Violations:
    """Prints, reads the environment or the clock."""
    for node in ast.walk(tree):
        for name in imported(node):
            if any(under(name, clock) for clock in CLOCKS) and name != DURATION:
                yield node.lineno, f"imports {name}"  # type: ignore[attr-defined]
            if name in ("os.environ", "os.getenv"):
                yield node.lineno, f"imports {name}"  # type: ignore[attr-defined]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield node.lineno, "prints"
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv"):
            yield node.lineno, f"reads {ast.unparse(node)}"


def writes_to_a_parameter(tree: ast.AST) -> Violations:
    """In-place changes of what is known to be a parameter.

    Known are names drawn from ``parameters()`` and its kin by a loop, and attributes called weight, bias or data. Of
    these, in-place methods (``add_``), augmented assignment and item assignment are writes; so is every assignment to
    ``.data``, and ``vector_to_parameters``. Initial values are none: ``nn.init``, and what a model sets of itself.
    """
    known = set(names_of_parameters(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            method = node.func.attr
            inplace = method.endswith("_") and not method.endswith("__") and method != "requires_grad_"
            if inplace and is_parameter(node.func.value, known):
                yield node.lineno, f"{ast.unparse(node.func)}()"
        if isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node).endswith("vector_to_parameters"):
            yield node.lineno, "vector_to_parameters"
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                item = isinstance(target, ast.Subscript) and is_parameter(target.value, known)
                added = isinstance(node, ast.AugAssign) and is_parameter(target, known)
                replaced = isinstance(target, ast.Attribute) and target.attr == "data"
                if item or added or replaced:
                    yield node.lineno, f"{ast.unparse(target)} ="


def names_of_parameters(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.For | ast.comprehension) and mentions_parameters(node.iter):
            yield from (n.id for n in ast.walk(node.target) if isinstance(n, ast.Name))


def mentions_parameters(node: ast.AST) -> bool:
    return any(isinstance(n, ast.Attribute) and n.attr in PARAMETER_LISTS for n in ast.walk(node))


def is_parameter(node: ast.AST, known: set[str]) -> bool:
    if isinstance(node, ast.Subscript):
        return is_parameter(node.value, known)
    if isinstance(node, ast.Name):
        return node.id in known
    return (
        isinstance(node, ast.Attribute)
        and (node.attr in PARAMETER_NAMES or is_parameter(node.value, known))
        and (node.attr not in ("grad", "state"))
    )


BANS: dict[str, tuple[Callable[[ast.AST], Violations], tuple[str, ...]]] = {
    "torch.distributed": (uses_of_distributed, ("comm/collective.py", "comm/checkpoint.py", "comm/hooks.py")),
    "the asynchronous engine": (uses_of_ray, ("parallel/",)),
    "writing to a parameter": (writes_to_a_parameter, ("optim/", "parallel/")),
    "printing, the environment and the clock": (uses_of_the_world, ("train/", "recipes/", "cli.py", *PROCESSES)),
}


@pytest.mark.parametrize("ban", BANS)
def test_the_ban_holds(ban: str) -> None:
    find, allowed = BANS[ban]
    found = [
        f"quadric/{name}:{line}: {what}"
        for name, path in FILES.items()
        if not name.startswith(allowed)
        for line, what in find(ast.parse(path.read_text()))
        if not (name.startswith("model/") and what.startswith("self."))
    ]
    assert not found, f"{ban} belongs in {' and '.join(allowed)} alone:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("ban", "source"),
    [
        ("torch.distributed", "import torch.distributed as dist"),
        ("torch.distributed", "from torch import distributed"),
        ("torch.distributed", "from torch.distributed.checkpoint import save"),
        ("torch.distributed", "import torch\ntorch.distributed.barrier()"),
        ("torch.distributed", "from torch import distributed as anything"),
        ("torch.distributed", "import importlib\nimportlib.import_module('torch.distributed')"),
        ("torch.distributed", "from torch.nn.parallel import DistributedDataParallel"),
        ("torch.distributed", "model = torch.nn.parallel.DistributedDataParallel(model)"),
        ("torch.distributed", "from torch.utils.data.distributed import DistributedSampler"),
        ("the asynchronous engine", "import ray"),
        ("the asynchronous engine", "from ray.util import ActorPool"),
        ("writing to a parameter", "for p in model.parameters():\n    p.add_(1)"),
        ("writing to a parameter", "for name, p in model.named_parameters():\n    p[0] = 1"),
        ("writing to a parameter", "for p, d in zip(space.parameters, pieces):\n    p += d"),
        ("writing to a parameter", "[p.data.zero_() for g in opt.param_groups for p in g['params']]"),
        ("writing to a parameter", "layer.weight.copy_(new)"),
        ("writing to a parameter", "layer.weight.data = new"),
        ("writing to a parameter", "model.out.bias[3] = 0"),
        ("writing to a parameter", "torch.nn.utils.vector_to_parameters(v, ps)"),
        ("printing, the environment and the clock", "print('x')"),
        ("printing, the environment and the clock", "import time"),
        ("printing, the environment and the clock", "from datetime import datetime"),
        ("printing, the environment and the clock", "import os\nhome = os.environ['HOME']"),
        ("printing, the environment and the clock", "from os import getenv"),
    ],
)
def test_the_ban_sees(ban: str, source: str) -> None:
    assert list(BANS[ban][0](ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        "for p in model.parameters():\n    p.requires_grad_(False)\n    p.grad = None",
        "total = torch.zeros(3)\ntotal.add_(1)\ntotal[0] += 2\ntotal += 1",
        "x = layer.weight + 1\ngradient += torch.autograd.grad(y, list(leaves.values()))",
        "import rayleigh, timeit\nfrom os import path\nfrom datetime import timedelta",
        "from quadric.comm.communicator import Solo\nimport torch.distributions",
    ],
)
def test_the_bans_leave_alone(source: str) -> None:
    assert [hit for find, _ in BANS.values() for hit in find(ast.parse(source))] == []


@pytest.mark.parametrize("name", FILES)
def test_the_file_is_short_and_documented(name: str) -> None:
    source = FILES[name].read_text()
    assert len(source.splitlines()) <= 450, f"quadric/{name} is too long to read at a sitting: split it"
    tree = ast.parse(source)
    public = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    silent = [f"{node.name} (line {node.lineno})" for node in public if not ast.get_docstring(node)]
    assert not source.strip() or ast.get_docstring(tree), f"quadric/{name} has no docstring"
    assert not silent, f"quadric/{name}: no docstring on {', '.join(silent)}"
