"""The one optimiser shell, and the named methods assembled from parts.

A second-order optimiser is a sentence: a descent proposes a path, a search picks a point on it, a damping rule
reads how true the model was.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from quadric.linalg.krylov import ConjugateGradient, FlexibleCG
from quadric.linalg.operator import Identity, LinearOperator
from quadric.linalg.pairs import Pair
from quadric.linalg.solver import KrylovSolver, Path
from quadric.linalg.truncation import FixedIterations, RelativeProgress, Truncation
from quadric.linalg.vector import dot
from quadric.objective.curvature import Curvature
from quadric.objective.objective import Data, Objective
from quadric.optim.damping import AfterRejection, Damping, LevenbergMarquardt
from quadric.optim.descent import EVERY_ITERATE, NGHF, Descent, LocalModel, NaturalGradient, NewtonCG
from quadric.optim.precondition import Preconditioner
from quadric.optim.search import Backtracking, BestIterate, Search, Step, Value
from quadric.outcome import Outcome
from quadric.space import ParameterSpace


@dataclass(frozen=True)
class Diagnosis:
    """What one second-order step did.

    Attributes:
        value: the objective before the step, on the gradient's data.
        old_value: the same on the data of the search, which may be other data.
        new_value: there at theta + d, that is after a step with an ``lr`` of 1; ``old_value`` when it was rejected.
        gradient_norm: ||g||.
        step_norm: ||d||, 0 when rejected.
        ratio: actual over predicted reduction, (f(theta + d) - f(theta)) / q(d), of the step in its full length, before
            the search shortened it; NaN when rejected.
        damping: the lambda the step was solved with.
        solver_steps: products of the solve, that is its iterations.
        products: with a curvature, all in all: of every run, of a warm start's residual, and of the ratio.
        evaluations: of the objective, by the search.
        solver: how the solve ended.
        outcome: how the step ended.
        gradient_frames, curvature_frames: the weight of the two samples, on all ranks together.
        seconds: of ``gradient``, ``products``, ``evaluation``, ``preconditioner``, ``communication`` and ``solver``
            (its vectors); empty where the objective has no clock.
    """

    value: float
    old_value: float
    new_value: float
    gradient_norm: float
    step_norm: float
    ratio: float
    damping: float
    solver_steps: int
    products: int
    evaluations: int
    solver: Outcome
    outcome: Outcome
    gradient_frames: float
    curvature_frames: float
    seconds: Mapping[str, float] = field(default_factory=dict)

    def record(self) -> dict[str, float | int | str]:
        """Flat numbers and names, for a log: ``products_seconds`` and the like for the times."""
        flat = {k: v.name.lower() if isinstance(v, Outcome) else v for k, v in asdict(self).items() if k != "seconds"}
        return flat | {f"{work}_seconds": spent for work, spent in self.seconds.items()}


class SecondOrder(torch.optim.Optimizer):
    """A second-order optimiser over all its parameters at once.

    Stepped with an `Objective`: ``optimizer.step(objective)``. Each group's ``lr`` (default 1) multiplies its part of
    the chosen step, so that schedulers work; none is needed.

    The state is the previous proposal and the pairs of the previous solve that the preconditioner asks for, both kept
    per parameter, and lambda, kept in the first group's ``damping``; ``state_dict`` holds them all.

    Args:
        params: parameters or groups, together exactly the objective's trainable parameters.
        descent: proposes a path of steps.
        search: picks one.
        damping: adapts lambda.
        preconditioner: of the descent's solver; None: none.

    Attributes:
        diagnosis: what the last step did.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        descent: Descent,
        search: Search,
        damping: Damping,
        preconditioner: Preconditioner | None = None,
    ) -> None:
        if not isinstance(damping, Damping):
            raise ValueError(f"damping={damping!r}: give a rule, such as quadric.optim.damping.Fixed(0.1)")
        super().__init__(params, {"lr": 1.0, "damping": damping.initial})
        self.descent, self.search, self.rule, self.preconditioner = descent, search, damping, preconditioner
        self.diagnosis: Diagnosis | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy needs: the parts beside what torch keeps."""
        names = ("descent", "search", "rule", "preconditioner", "diagnosis")
        parts = {name: getattr(self, name) for name in names}
        return {**super().__getstate__(), **parts}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Tensor:  # type: ignore[override]
        """One step; returns the objective's value before it.

        Raises:
            ValueError: ``closure`` is not an `Objective`, or one of other parameters than the optimiser's.
        """
        objective = self._checked(closure)
        watch, before = objective.stopwatch, dict(objective.stopwatch.seconds)
        with watch.on("solver"):
            found = self._step(objective)
        seconds = {work: spent - before.get(work, 0.0) for work, spent in watch.seconds.items()}
        self.diagnosis = replace(found, seconds=seconds)
        return torch.tensor(found.value, dtype=torch.float64)

    def _step(self, objective: Objective) -> Diagnosis:
        space, damping = objective.space, float(self.param_groups[0]["damping"])
        theta = space.point()
        with torch.enable_grad():
            value, gradient = objective.value_and_grad(theta)
        if not math.isfinite(value) or not bool(gradient.isfinite().all()):
            local = LocalModel(theta, value, gradient, Identity(space.size))
            self._remember(space, None, ())
            self.param_groups[0]["damping"] = self.rule.update(damping, math.nan)
            nothing = Path((), Outcome.NON_FINITE_OBJECTIVE)
            return _diagnose(objective, value, local, nothing, None, math.nan, damping, 0)
        search = _Counted(partial(objective.value, data=self.search.on))
        local = self._local_model(objective, theta, value, gradient)
        M = None
        if self.preconditioner is not None:
            shift = self.descent.shift(local, damping)
            M = self.preconditioner.operator(objective, local, self._pairs(space), shift)
        path = self.descent.propose(local, damping=damping, x0=self._previous(space), M=M)
        step = self.search.select(local, path, search)
        ratio = self._ratio(local, step)
        if step is not None:
            self._move(space, step.direction)
        whole = step is not None and step.scale == 1
        self._remember(space, path.points[-1].x if whole else None, path.pairs)
        if path.outcome is not Outcome.ZERO_RIGHT_HAND_SIDE:  # where nothing was asked, nothing was learnt
            self.param_groups[0]["damping"] = self.rule.update(damping, ratio, whole=whole)
        return _diagnose(objective, value, local, path, step, ratio, damping, search.calls)

    def _local_model(self, objective: Objective, theta: Tensor, value: float, gradient: Tensor) -> LocalModel:
        if self.search.on is not Data.GRADIENT:
            value = objective.value(theta, self.search.on)
        kinds = [kind for kind in (self.descent.kind, self.descent.metric) if kind is not None]
        return LocalModel(theta, value, gradient, *map(_Products, objective.curvatures(theta, kinds)))

    def _checked(self, closure: Any) -> Objective:
        if not isinstance(closure, Objective):
            raise ValueError(
                f"closure={closure!r}: a second-order step needs curvature; call step(objective) with a "
                "quadric.objective.Objective"
            )
        own = {id(p) for group in self.param_groups for p in group["params"] if p.requires_grad}
        if own != {id(p) for p in closure.space.parameters}:
            raise ValueError(
                f"the objective's model has {len(closure.space.parameters)} trainable parameters, the optimiser "
                f"{len(own)}, and they are not the same tensors: build the optimiser from this model's parameters()"
            )
        return closure

    def _ratio(self, local: LocalModel, step: Step | None) -> float:
        """Actual over predicted reduction of the step in its full length, the prediction by the undamped model.

        A line search only has to shorten far enough for any model to be right: it must not tell the damping so.
        """
        if step is None:
            return math.nan
        d = step.direction / step.scale
        predicted = dot(local.gradient, d) + 0.5 * dot(d, local.curvature @ d)
        return (step.whole - local.value) / predicted if predicted < 0 else math.nan

    def _move(self, space: ParameterSpace, direction: Float[Tensor, " n"]) -> None:
        rates = {id(p): float(group["lr"]) for group in self.param_groups for p in group["params"]}
        for parameter, piece in zip(space.parameters, space.split(direction), strict=True):
            parameter.add_(piece, alpha=rates[id(parameter)])

    def _previous(self, space: ParameterSpace) -> Float[Tensor, " n"] | None:
        if any("proposal" not in self.state[p] for p in space.parameters):
            return None
        for name, p in zip(space.names, space.parameters, strict=True):
            if self.state[p]["proposal"].shape != p.shape:
                raise ValueError(
                    f"the optimiser's state has shape {tuple(self.state[p]['proposal'].shape)} for {name}, the model "
                    f"{tuple(p.shape)}: load the state_dict of an optimiser of this model"
                )
        return space.flatten(self.state[p]["proposal"] for p in space.parameters)

    def _pairs(self, space: ParameterSpace) -> tuple[Pair, ...]:
        """The pairs that the previous solve left, oldest first: ``s0, y0, s1, ...`` in every parameter's state."""
        pairs: list[Pair] = []
        while all(f"y{len(pairs)}" in self.state[p] for p in space.parameters):
            s, y = (space.flatten(self.state[p][f"{name}{len(pairs)}"] for p in space.parameters) for name in "sy")
            pairs.append(Pair(len(pairs) + 1, s, y))
        return tuple(pairs)

    def _remember(self, space: ParameterSpace, proposal: Float[Tensor, " n"] | None, pairs: Sequence[Pair]) -> None:
        """Keeps the pairs, and the proposal for the next start; without one, the next starts from zero.

        A proposal is kept when its step was taken whole. Where the line search had to shorten it or gave it up, the
        model was wrong along it, and starting from 0.95 of it would propose the same again.
        """
        vectors = {} if proposal is None else {"proposal": proposal}
        for i, pair in enumerate(pairs):
            vectors |= {f"s{i}": pair.s, f"y{i}": pair.y}
        pieces = {name: space.split(vector) for name, vector in vectors.items()}
        for i, parameter in enumerate(space.parameters):
            self.state[parameter] = {name: split[i].clone() for name, split in pieces.items()}


class _Products(LinearOperator):
    """An operator that counts its products."""

    def __init__(self, operator: LinearOperator) -> None:
        self.operator, self.calls = operator, 0
        self.size, self.symmetric = operator.size, operator.symmetric

    def apply(self, v: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        self.calls += 1
        return self.operator @ v


class _Counted:
    """The objective's value, counting its evaluations."""

    def __init__(self, value: Value) -> None:
        self.value, self.calls = value, 0

    def __call__(self, theta: Float[Tensor, " n"]) -> float:
        self.calls += 1
        return self.value(theta)


def _diagnose(
    objective: Objective,
    value: float,
    local: LocalModel,
    path: Path,
    step: Step | None,
    ratio: float,
    damping: float,
    evaluations: int,
) -> Diagnosis:
    if step is not None:
        outcome = Outcome.ACCEPTED
    elif path.points and evaluations and path.outcome is not Outcome.ZERO_RIGHT_HAND_SIDE:
        outcome = Outcome.NO_DECREASE
    else:
        outcome = path.outcome
    return Diagnosis(
        value=value,
        old_value=local.value,
        new_value=local.value if step is None else step.value,
        gradient_norm=math.sqrt(dot(local.gradient, local.gradient)),
        step_norm=0.0 if step is None else math.sqrt(dot(step.direction, step.direction)),
        ratio=ratio,
        damping=damping,
        solver_steps=path.steps if path.points else 0,
        products=sum(op.calls for op in (local.curvature, local.metric) if isinstance(op, _Products)),
        evaluations=evaluations,
        solver=path.outcome,
        outcome=outcome,
        gradient_frames=objective.frames,
        curvature_frames=objective.curvature_frames,
    )


def hessian_free(
    params: Iterable[Any],
    *,
    damping: float = 1.0,
    max_steps: int = 100,
    tolerance: float = 5e-4,
    momentum: float = 0.95,
    preconditioner: Preconditioner | None = None,
) -> SecondOrder:
    """Hessian-free optimisation (Martens, 2010): Gauss-Newton by conjugate gradients, adaptively damped.

    Args:
        params: the model's parameters.
        damping: the first lambda; it adapts by the Levenberg-Marquardt rule.
        max_steps: conjugate-gradient iterations a step at most.
        tolerance: of the relative progress that ends them.
        momentum: the share of the previous solution they start from.
        preconditioner: of the conjugate gradients.

    >>> from torch import nn
    >>> from quadric.loss.loss import SquaredError
    >>> model = nn.Linear(2, 1)
    >>> x = torch.randn(8, 2)
    >>> optimizer = hessian_free(model.parameters(), damping=1e-6)
    >>> _ = optimizer.step(Objective(model, SquaredError(), [(x, x.sum(1, keepdim=True))]))
    >>> bool(torch.allclose(model.weight, torch.ones(1, 2), atol=1e-3))
    True
    """
    solver = _solver(preconditioner, max_steps, RelativeProgress(tolerance))
    return SecondOrder(
        params,
        descent=NewtonCG(solver, momentum),
        search=Backtracking(),
        damping=LevenbergMarquardt(damping),
        preconditioner=preconditioner,
    )


def natural_gradient(
    params: Iterable[Any],
    *,
    iterations: int = 8,
    metric: Curvature = Curvature.EMPIRICAL_FISHER,
    damping: Damping | None = None,
    search: Search | None = None,
    preconditioner: Preconditioner | None = None,
) -> SecondOrder:
    """Natural gradient by a short run of conjugate gradients on F d = -g (Haider and Woodland, 2017).

    Args:
        params: the model's parameters.
        iterations: of conjugate gradients.
        metric: F.
        damping: the rule of lambda, a share of the curvature (see `NaturalGradient`); default: none, as in the papers,
            until a step fails.
        search: among the iterates; default: the best of all on the curvature's data, `BestIterate`.
        preconditioner: of the conjugate gradients.
    """
    solver = _solver(preconditioner, iterations, FixedIterations(iterations), storage_ratio=EVERY_ITERATE)
    return SecondOrder(
        params,
        descent=NaturalGradient(solver, metric),
        search=search or BestIterate(),
        damping=damping or AfterRejection(),
        preconditioner=preconditioner,
    )


def nghf(
    params: Iterable[Any],
    *,
    iterations: int = 8,
    metric: Curvature = Curvature.EMPIRICAL_FISHER,
    damping: Damping | None = None,
    search: Search | None = None,
    preconditioner: Preconditioner | None = None,
) -> SecondOrder:
    """Natural gradient and Hessian-free combined by two short runs of conjugate gradients (Haider et al., 2021).

    Args:
        params: the model's parameters.
        iterations: of either run; 5 to 8 in the paper.
        metric: F of the first run.
        damping: the rule of lambda in either run, a share of the curvature (see `NGHF`); default: a hundredth, more
            where a step fails. The paper's is ``Fixed(0.0)``: as good from a trained start, slower from a random one.
        search: among the second run's iterates; default: the best of all on the curvature's data, `BestIterate`.
        preconditioner: of both runs; one that is made of pairs, of the first alone (see `NGHF`).
    """
    first = _solver(preconditioner, iterations, FixedIterations(iterations))
    by_pairs = first.pairs is not None
    second = _solver(None if by_pairs else preconditioner, iterations, FixedIterations(iterations), EVERY_ITERATE)
    return SecondOrder(
        params,
        descent=NGHF(first, second, metric=metric, preconditions=not by_pairs),
        search=search or BestIterate(),
        damping=damping or AfterRejection(initial=0.01),
        preconditioner=preconditioner,
    )


def _solver(
    preconditioner: Preconditioner | None, max_steps: int, stop: Truncation, storage_ratio: float = 1.3
) -> KrylovSolver:
    """Conjugate gradients as the preconditioner needs them."""
    if preconditioner is None:
        return ConjugateGradient(max_steps, stop, storage_ratio)
    if not isinstance(preconditioner, Preconditioner):
        raise ValueError(f"preconditioner={preconditioner!r}: give one such as quadric.optim.precondition.LBFGS()")
    kind = FlexibleCG if preconditioner.changes else ConjugateGradient
    return kind(max_steps, stop, storage_ratio, preconditioner.pairs)
