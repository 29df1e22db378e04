"""What a layer's module is called with, and the gradient at its output: seen by hooks, of the steps that need it.

A gradient is a sum over examples; a curvature of examples needs the summands. Of a linear layer these are known from
its calls: with inputs a and cotangents c, the gradient of its weight is the sum of the c a'.

Hooks are on the modules from the optimiser's making to its end. In a step whose statistics are not due they test a
flag. In one that is, a forward pass leaves its inputs with the graph, which has most of them anyway, and the backward
pass puts them together with the cotangents. What no backward pass reaches is gone with its graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quadric.optim.blocks import Call, statistics_type
from quadric.optim.layers import Kind, Layer


class Capture:
    """Records the calls of the modules of ``layers``.

    A call counts if it is of a module that holds the layer's weight itself, in a forward pass with gradients enabled,
    and if a backward pass comes through it. Several calls in a pass and several passes, whose gradients are
    accumulated, are all there. Passes are forgotten where the gradient is: after ``zero_grad()``, and where the
    weight has no gradient as the next pass comes.

    Calls under ``torch.compile``, ``torch.func`` transforms and `torch.nn.DataParallel` are not recorded. Recomputed
    activations (``torch.utils.checkpoint``) are kept in the steps that record, and save nothing there.

    Args:
        model: all of its modules that hold a layer's weight are heard.
        layers: whose modules these are.
        due: whether to record now.
        outputs: layers of whose calls the outputs are summed, at once: the next module may change them in place.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], due: Callable[[], bool], outputs: Collection[Layer] = ()
    ) -> None:
        self.layers, self._outputs = tuple(layers), frozenset(outputs)
        self._due, self._forced = due, False
        self._calls: dict[int, list[Call]] = {}
        self._passes: dict[int, int] = {}
        places = {id(layer.weight): place for place, layer in enumerate(self.layers)}
        hooks = []
        for module in model.modules() if places else ():
            place = places.get(id(getattr(module, "weight", None)))
            if place is not None:
                tap = _Tap(weakref.ref(self), place)
                hooks.append(module.register_forward_hook(tap, prepend=True, with_kwargs=True))
        self.close = weakref.finalize(self, _remove, hooks)
        self.close.atexit = False

    @property
    def listening(self) -> bool:
        """Whether calls are recorded now."""
        return self._forced or self._due()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Records what happens inside, due or not, and drops what was before."""
        self.clear()
        self._forced = True
        try:
            yield
        finally:
            self._forced = False

    def take(self) -> Mapping[Layer, list[Call]]:
        """The calls since the last time, of the layers that have any."""
        calls = {self.layers[place]: found for place, found in sorted(self._calls.items())}
        self.clear()
        return calls

    def clear(self) -> None:
        """Forgets what is recorded."""
        self._calls, self._passes = {}, {}

    def called(self, place: int, module: nn.Module, inputs: Tensor, output: Any) -> None:
        """Waits for the gradient at an output."""
        layer = self.layers[place]
        seen = isinstance(output, Tensor) and output.requires_grad and torch.is_grad_enabled()
        if not seen or module.weight is not layer.weight or torch._C._functorch.is_functorch_wrapped_tensor(output):
            return
        inputs = inputs.detach()
        total = _sum(output.detach(), layer) if layer in self._outputs else None

        def arrived(cotangent: Tensor) -> None:
            if self.listening:
                self._record(place, inputs, cotangent.detach(), total)

        output.register_hook(arrived)

    def _record(self, place: int, inputs: Tensor, cotangent: Tensor, total: Tensor | None) -> None:
        found, weight = self._calls.setdefault(place, []), self.layers[place].weight
        current = torch._C._current_graph_task_id()
        if current != self._passes.get(place):
            self._passes[place] = current
            if weight.grad is None:
                found.clear()
            number = found[-1].number + 1 if found else 0
        else:
            number = found[-1].number
        if inputs.dim() < weight.dim():
            inputs, cotangent = inputs.unsqueeze(0), cotangent.unsqueeze(0)
        found.append(Call(inputs, cotangent, number, total))


class _Tap:
    """What a module calls after its forward pass. That of a copied or stored module says nothing to anyone."""

    def __init__(self, capture: Callable[[], Capture | None] = lambda: None, place: int = 0) -> None:
        self.capture, self.place = capture, place

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        capture = self.capture()
        if capture is not None and capture.listening:
            capture.called(self.place, module, args[0] if args else kwargs["input"], output)

    def __reduce__(self) -> tuple[type[_Tap], tuple[()]]:
        return _Tap, ()


def _remove(hooks: Sequence[Any]) -> None:
    for hook in hooks:
        hook.remove()


def _sum(output: Tensor, layer: Layer) -> Tensor:
    """Over all dimensions but the channels: the last of a linear layer's, a convolution's before its positions."""
    channels = output.dim() - layer.weight.dim() + 1
    others = [dimension for dimension in range(output.dim()) if dimension != channels]
    return output.sum(others, dtype=statistics_type(output)) if others else output.to(statistics_type(output))


def examples(calls: Sequence[Call]) -> int:
    """How many the calls are of: entries of the first dimension, of each pass those of its largest call."""
    largest: dict[int, int] = {}
    for call in calls:
        largest[call.number] = max(largest.get(call.number, 0), len(call.inputs))
    return sum(largest.values())


def obstacle(layer: Layer) -> str | None:
    """Why a layer's calls do not show its gradient's summands; None where they do. Empty where its kind says it."""
    module = layer.module
    if layer.kind not in (Kind.MATRIX, Kind.KERNELS):
        return ""
    if isinstance(module, nn.Linear):
        return None if type(module).forward is nn.Linear.forward else "its class has a forward pass of its own"
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        plain = nn.Conv1d if isinstance(module, nn.Conv1d) else nn.Conv2d
        if type(module).forward is not plain.forward:
            return "its class has a forward pass of its own"
        return None if module.groups == 1 else "its channels are in groups"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "neither Conv1d nor Conv2d"
    return "its products are made inside of the module"


UNCALLED = "its module is not called"
"""Why a layer whose `obstacle` is None may have another block all the same."""
