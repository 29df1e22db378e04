"""The shell of the block-diagonal family: a torch optimiser that steps by the inverse of a curvature of layers.

Mini-block Fisher, KFAC, K-BFGS, Shampoo and TNT differ in the block they give a layer. What they share is here: which
layers there are, when statistics and inverses are made, momentum, weight decay, the length of a step, and the treaty
with torch.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quadric.comm.communicator import Communicator, Solo
from quadric.objective.objective import Objective
from quadric.optim.blocks import (
    Block,
    Call,
    SecondLook,
    Seen,
    forget,
    has_statistics,
    ready,
    shown_by,
    sound,
    squarable,
    statistics_type,
)
from quadric.optim.capture import Capture
from quadric.optim.checks import check_parameter, check_parts, check_rates, loss_of
from quadric.optim.coverage import (
    Coverage,
    check_memory,
    check_present,
    check_state,
    coverage_of,
    described,
    tell_left_out,
)
from quadric.optim.damping import Damping, Fixed
from quadric.optim.fisher import Fisher, check_closure, check_fisher, drawn
from quadric.optim.layers import Gradient, Layer, find_layers
from quadric.optim.length import Length, UnitEntries
from quadric.optim.loss_scale import LossScale, scale_of_calls, unscale_
from quadric.optim.ranks import mean_over_ranks, refresh, tally
from quadric.optim.schedule import Schedule
from quadric.optim.second_pass import SecondPass, compare, look
from quadric.options import check_whole

logger = logging.getLogger(__name__)

UNHEARD = 50
"""Statistics in a row without a call, though with a gradient, after which a layer that had calls loses its block."""


class BlockDiagonal(torch.optim.Optimizer):
    """An optimiser whose steps are those of heavy-ball momentum, times the inverse of a block for each layer.

    m <- momentum m + g, and then theta <- (1 - lr weight_decay) theta - lr c P m, with c of the rule of lengths. Used
    like any first-order optimiser of torch: after ``backward()``, or with a closure.

    Where the gradient, the new statistics or the new inverses are not finite, or a gradient is too large to be squared,
    the step is skipped and counted, in the first group's ``skipped``. Statistics that have overflown begin anew.

    A layer that has no statistics yet follows its momentum: its gradient has first come when none are due, or its
    block wants calls of its module, and the forward pass was before the optimiser was made. A second gradient without
    calls, of a step between which and the first the hooks were there, says that the module is not called: another block
    takes the place of the layer's own.

    Args:
        model: whose layers these are.
        block: gives a layer its block.
        params: parameters or groups of ``model``; None: all that are trainable.
        lr, momentum, weight_decay: defaults of the groups.
        damping: added to a block's diagonal, as a share of its layer's mean curvature; kept in the first group. A rule,
            such as `LevenbergMarquardt`, makes it follow the ratio of the actual to the foreseen reduction, which steps
            that make inverses measure by the closure; it is for lengths that are `Natural` or near it.
        schedule: when statistics and inverses are made.
        length: of the steps.
        fisher: whose gradients and calls the statistics are of: those of the step, or, where "sampled", those of the
            same batch at targets drawn from the model, for which `step` and `observe` want an `Objective`; steps whose
            statistics are due then have a second pass.
        patience: steps skipped in a row after which there is an error.
        communicator: of ranks that hold the same model and give it the same gradients, as DistributedDataParallel and
            an `Objective` do: each makes a part of the inverses, dealt out by cost, and has the others' from them.
            Statistics of calls are those of all ranks' calls; ranks that hold parts of a batch have the same as one
            that holds it all, by an `Objective`, and by means over the ranks of means over parts of one size.
        loss_scale: what the loss is multiplied by before ``backward()`` where gradients are divided by it before a
            step, as ``scaler.get_scale``: calls are recorded between the two. `torch.amp.GradScaler.step` tells it
            itself, if its ``unscale_`` has not been called before. It is not for a loss divided by the number of
            backward passes whose gradients are accumulated, which makes the mean over the examples of all.

    Attributes:
        coverage: which block each parameter has got, and why.

    Raises:
        ValueError: an option out of range; a parameter that is not the model's, or complex, or sharded.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        model: nn.Module,
        block: Callable[[Layer], Block],
        params: Iterable[Any] | None = None,
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        damping: float | Damping = 0.03,
        schedule: Schedule = Schedule(),
        length: Length = UnitEntries(),
        fisher: Fisher = "empirical",
        patience: int = 10,
        communicator: Communicator = Solo(),
        loss_scale: LossScale | None = None,
    ) -> None:
        check_rates(lr=lr, momentum=momentum, weight_decay=weight_decay)
        check_parts(model, damping, ("schedule", schedule, Schedule), ("length", length, Length))
        self.rule = damping if isinstance(damping, Damping) else Fixed(damping)
        if not self.rule.initial > 0:
            raise ValueError(f"damping={damping}: must start above zero: statistics of few steps have no inverse else")
        check_whole(patience=patience)
        if patience < 1:
            raise ValueError(f"patience={patience}: give a number of steps, 1 at least")
        self.model, self.block, self.schedule, self.length, self.patience = model, block, schedule, length, patience
        self.communicator, self.fisher, self.loss_scale = communicator, check_fisher(fisher), loss_scale
        self._blocks: list[Block] = []
        self._whole = params is None
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([p for p in model.parameters() if p.requires_grad] if params is None else params, defaults)
        self.param_groups[0].update(damping=self.rule.initial, step=0, observed=0, skipped=0, skipped_in_a_row=0)
        self._listen()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy needs: the parts beside what torch keeps."""
        names = ("model", "block", "schedule", "length", "patience", "rule", "communicator", "fisher", "loss_scale")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in (*names, "_blocks", "_whole")}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._listen()

    def _listen(self) -> None:
        """Has the calls recorded that blocks ask for, on steps when statistics are due."""
        due = weakref.WeakMethod(self._due)
        layers = [block.layer for block in self._serving if block.wants_calls]
        outputs = [block.layer for block in self._serving if isinstance(block, SecondLook)]
        self._capture = Capture(self.model, layers, lambda: (method := due()) is not None and method(), outputs)

    def _due(self) -> bool:
        return self.param_groups[0]["step"] % self.schedule.statistics == 0

    @property
    def _serving(self) -> list[Block]:
        """The blocks; of a layer whose module was not called, the one that takes the place of its own."""
        return [
            block.otherwise if block.otherwise and "uncalled" in self.state.get(block.layer.weight, ()) else block
            for block in self._blocks
        ]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        names = {id(p): name for name, p in self.model.named_parameters()}
        params = [p for group in self.param_groups for p in group["params"]]
        for p in params:
            check_parameter(p, names.get(id(p)), self.model)
        known = {block.layer.parameters: block for block in self._blocks}
        layers = find_layers(self.model, params)
        self._blocks = [known[layer.parameters] if layer.parameters in known else self.block(layer) for layer in layers]
        for parameters in known.keys() - {layer.parameters for layer in layers}:
            self.state.pop(parameters[0], None)  # the layer has another parameter now, and begins anew
        check_memory([block for block in self._blocks if block.layer.parameters not in known], self.communicator)
        if hasattr(self, "_capture"):
            self._capture.close()
            self._listen()

    @property
    def wants_closure(self) -> bool:
        """Whether `step` must have a closure, which it calls again after a step."""
        return any(isinstance(block, SecondLook) for block in self._serving) or not isinstance(self.rule, Fixed)

    @property
    def coverage(self) -> tuple[Coverage, ...]:
        return coverage_of(self.model, self._serving)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what the closure does.

        Raises:
            ValueError: no parameter has a gradient, or one is sparse; there is no closure where one is wanted, or no
                `Objective` where the Fisher matrix is "sampled", or no loss where damping follows it; the scale of the
                loss is not known.
            FloatingPointError: too many steps in a row were skipped.
        """
        check_closure(self.fisher, closure)
        scale = unscale_(self, closure, self.loss_scale)
        if not scale:  # and the scaler lowers it
            self._capture.clear()
            return None
        value = second_pass = None
        if closure is not None:
            second_pass = SecondPass(self.model, closure) if self.wants_closure else None
            with torch.enable_grad():
                value = closure()
        elif not isinstance(self.rule, Fixed):
            raise ValueError(f"damping={self.rule}: it follows the loss after a step; call step(closure)")
        elif self.wants_closure:
            raise ValueError("step() without a closure: pairs are of a second pass after the step; call step(closure)")
        if not isinstance(self.rule, Fixed):
            loss_of(value)
        calls, shown = self._capture.take(), shown_by(self._serving)
        if self._finite(shown):
            self._advance(value, shown, calls, self._of_calls(closure, scale), closure, second_pass)
        return value

    def _of_calls(self, closure: Callable[[], Any] | None, scale: float) -> float:
        """`Seen.scale`, where there are calls to be seen."""
        wanted = self._due() and self._capture.layers
        return scale_of_calls(closure, scale, self.communicator.size) if wanted else 1.0

    def _advance(
        self,
        value: Any,
        shown: list[tuple[Block, Gradient]],
        calls: Mapping[Layer, Sequence[Call]],
        scale: float,
        closure: Callable[[], Any] | None,
        second_pass: SecondPass | None,
    ) -> None:
        """The step by the gradients that are ``shown``."""
        counts = self.param_groups[0]
        refreshes = self.schedule.refreshes(counts["step"])
        due, share = self._due(), self.schedule.share(counts["observed"])
        if due and not self._observe(shown, calls, share, scale, closure):
            return
        before = look(shown, calls, scale, self.communicator) if due else {}
        calls = {}  # before those of another pass
        if not self._refresh(shown, every=refreshes):
            return
        if (foreseen := self._move(shown)) is None:
            return
        after = None
        if before and second_pass is not None:
            with self._capture.recording():
                after = second_pass()
                found = self._capture.take()
                compare(before, found, self.state, share, counts["damping"], scale, self.communicator)
        if refreshes and second_pass is not None and not isinstance(self.rule, Fixed):
            self._adapt(value, second_pass() if after is None else after, foreseen)
            self._capture.clear()
        counts.update(step=counts["step"] + 1, skipped_in_a_row=0)

    def _adapt(self, before: Any, after: Any, foreseen: float) -> None:
        """The next damping, by what the loss is after the step, on the same data."""
        change = loss_of(after) - loss_of(before)
        self.param_groups[0]["damping"] = self.rule.update(
            self.param_groups[0]["damping"], change / foreseen if foreseen < 0 else math.nan
        )

    @torch.no_grad()
    def observe(self, closure: Callable[[], Any] | None = None) -> None:
        """Takes the present gradients into the statistics, without a step: for a pass over the data before the first.

        For each minibatch: ``optimizer.zero_grad()``, ``backward()``, ``optimizer.observe()``, or
        ``optimizer.observe(closure)``. All count the same.
        """
        check_closure(self.fisher, closure)
        if self._capture.layers and not self._due():
            raise ValueError(
                "observe() in a step when no statistics are due: calls of modules are not recorded then; call it "
                "before the first step, or set statistics=1 in the schedule"
            )
        scale = unscale_(self, closure, self.loss_scale)
        if closure is not None:
            with torch.enable_grad():
                closure()
        calls, shown = self._capture.take(), shown_by(self._serving)
        share = 1 / (self.param_groups[0]["observed"] + 1)
        if self._finite(shown) and self._observe(shown, calls, share, self._of_calls(closure, scale), closure):
            self.param_groups[0]["skipped_in_a_row"] = 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._capture.clear()

    def _finite(self, shown: Sequence[tuple[Block, Gradient]]) -> bool:
        """Whether all gradients are, and their squares; counts it if not."""
        if squarable([g for _, gradient in shown for g in gradient]):
            return True
        bad = [(block, gradient) for block, gradient in shown if not squarable(gradient)]
        infinite = [block for block, gradient in bad if not all(bool(g.isfinite().all()) for g in gradient)]
        if infinite:
            return self._skip("the gradient", infinite)
        return self._skip("the square of the gradient", [block for block, _ in bad])

    def _skip(self, what: str, blocks: Sequence[Block]) -> bool:
        """Counts a step that is not taken, and says why; False."""
        counts = self.param_groups[0]
        counts["skipped"] += 1
        counts["skipped_in_a_row"] += 1
        what += f" of {', '.join([block.layer.name for block in blocks][:3])}"
        logger.warning("step skipped: %s is not finite", what)
        if counts["skipped_in_a_row"] >= self.patience:
            raise FloatingPointError(
                f"{what} was not finite in {self.patience} steps in a row: lower lr, or look for NaN and infinity in "
                "the parameters and the data; patience sets this number"
            )
        return False

    def _observe(
        self,
        shown: list[tuple[Block, Gradient]],
        calls: Mapping[Layer, Sequence[Call]],
        share: float,
        scale: float,
        closure: Callable[[], Any] | None,
    ) -> bool:
        """Moves the statistics, unless what is drawn for them is not finite; whether they are."""
        counts, blocks, gradients = self.param_groups[0], [block for block, _ in shown], [own for _, own in shown]
        if self.fisher == "sampled" and isinstance(closure, Objective):
            gradients = drawn(closure, counts["observed"], [block.layer for block in blocks])
            calls = self._capture.take()
            if not self._finite(list(zip(blocks, gradients, strict=True))):
                return False
        tallies = tally([block.layer for block in blocks], calls, self.communicator)
        for place, (block, gradient, heard) in enumerate(zip(blocks, gradients, tallies, strict=True)):
            numbers, found, own = self.state[block.layer.weight], calls.get(block.layer, ()), shown[place][1]
            if heard.calls or not block.wants_calls:
                seen = Seen(gradient, found, heard.examples, heard.positions, scale)
                numbers.pop("unheard", None)
                block.observe(numbers, seen, share if has_statistics(self.state[block.layer.weight]) else 1.0)
                if block.wants_calls:
                    mean_over_ranks(numbers, self.communicator)
            elif any(bool(g.any()) for g in (*gradient, *own)):
                numbers["unheard"] = numbers.get("unheard", torch.tensor(0)) + 1
                if int(numbers["unheard"]) >= (UNHEARD if has_statistics(numbers) else 2):
                    shown[place] = (self._replaced(block, gradient), own)
        if not sound([self.state[block.layer.weight] for block in blocks]):
            bad = [block for block in blocks if not sound([self.state[block.layer.weight]])]
            return self._begin_anew("the curvature", bad, "statistics_")
        counts["observed"] += 1
        return True

    def _begin_anew(self, what: str, bad: Sequence[Block], prefix: str = "") -> bool:
        """Drops what is not finite, or leads to it, before parameters are touched, and skips the step; False."""
        for block in bad:
            forget(self.state[block.layer.weight], prefix)
        return self._skip(what, bad)

    def _replaced(self, block: Block, gradient: Gradient) -> Block:
        """What takes the place of the block of a layer whose module was not called, though it has a gradient."""
        assert block.otherwise is not None
        logger.warning("%s: %s; it has %s", block.layer.name, block.otherwise.reason, type(block.otherwise).__name__)
        numbers = self.state[block.layer.weight]
        forget(numbers)
        numbers["uncalled"] = torch.tensor(True)
        block.otherwise.observe(numbers, Seen(gradient), 1.0)
        self._capture.close()
        self._listen()
        return block.otherwise

    def _refresh(self, shown: Sequence[tuple[Block, Gradient]], *, every: bool) -> bool:
        """Makes the inverses of all blocks, or of those among ``shown`` that have statistics and none yet.

        Whether they are finite; counts it if not.
        """
        if every:
            check_present(self.model, self._blocks)
            if self._whole:
                self._whole = not tell_left_out(self.model, self._blocks)
        candidates = (
            self._serving if every else [block for block, _ in shown if not ready(self.state[block.layer.weight])]
        )
        observed = [block for block in candidates if has_statistics(self.state[block.layer.weight])]
        bad = refresh(observed, self.state, self.param_groups[0]["damping"], self.communicator)
        return not bad or self._skip("the inverse", bad)

    def _move(self, shown: Sequence[tuple[Block, Gradient]]) -> float | None:
        """Takes the step d; returns what is foreseen of it where damping adapts: g'd + d'(S + lambda) d / 2.

        By the blocks, (S + lambda) P m = m. None where d is not finite, and is not taken. A parameter without a
        gradient, as one that was frozen, stays where it is.
        """
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        momenta, steps = [], []
        for block, gradient in shown:
            pairs = zip(block.layer.parameters, gradient, strict=True)
            momenta.append([self._push(p, g, groups[id(p)]) for p, g in pairs])
            known = ready(self.state[block.layer.weight])
            steps.append(block.apply(self.state[block.layer.weight], momenta[-1]) if known else momenta[-1])
        factors = self.length.factors(steps, momenta, max(group["lr"] for group in self.param_groups))
        if not all(map(math.isfinite, factors)) or not isinstance(self.length, UnitEntries):
            pairs_of = zip(shown, steps, strict=True)
            if bad := [block for (block, _), ds in pairs_of if not all(bool(d.isfinite().all()) for d in ds)]:
                self._begin_anew("the step", bad)
                return None
        foreseen = 0.0
        for (block, gradient), momentum, step, factor in zip(shown, momenta, steps, factors, strict=True):
            for p, g, m, d in zip(block.layer.parameters, gradient, momentum, step, strict=True):
                if p.grad is None:
                    continue
                group = groups[id(p)]
                rate = group["lr"] * factor
                if not isinstance(self.rule, Fixed):
                    foreseen += rate * (0.5 * rate * float((m * d).sum()) - float((g * d).sum()))
                if group["weight_decay"]:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(d, alpha=-rate)
        return foreseen

    def _push(self, p: nn.Parameter, g: Tensor, group: dict[str, Any]) -> Tensor:
        """The momentum of a parameter, with its new gradient; zero for one that has none."""
        if not group["momentum"] or p.grad is None:
            return g.to(statistics_type(p))
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p, dtype=statistics_type(p), memory_format=torch.contiguous_format)
        return state["momentum"].mul_(group["momentum"]).add_(g)

    def state_dict(self) -> dict[str, Any]:
        """As every optimiser's; the first group says what the blocks are."""
        state = super().state_dict()
        state["param_groups"][0]["blocks"] = described(self._blocks)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimiser's, but statistics keep their type: torch would round them to the parameters'.

        Raises:
            ValueError: it is the state of another kind of optimiser, or of blocks of other sizes.
        """
        check_state(state_dict, self._blocks)
        super().load_state_dict(state_dict)
        self.param_groups[0].pop("blocks")
        places = [place for group in state_dict["param_groups"] for place in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for place, p in zip(places, params, strict=True):
            for name, value in state_dict["state"].get(place, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.detach().to(p.device, copy=True)
