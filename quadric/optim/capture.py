"""What a layer's module is called with, and the gradient at its output: seen by hooks, of the steps that need it.

A gradient is a sum over examples; a curvature of examples needs the summands. Of a linear layer these are known from
its calls: with inputs a and cotangents c, the gradient of its weight is the sum of the c a'.

Hooks are on the modules from the optimiser's making to its end. In a step whose statistics are not due they test a
flag. In one that is, a forward pass leaves its inputs with the graph, which has most of them anyway, and the backward
pass puts them together with the cotangents. What no backward pass reaches is gone with its graph.

Modules with products inside, recurrent ones and attention, have their pass made once more when the calls are wanted
(see `rerun`). Where it cannot be made again, because the module drops at random inside, or because autograd would show
more than the gradient at a cell's outputs, the pass of such a step is the unfused one, in the place of the module's.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.weak import WeakTensorKeyDictionary

from quadric.optim.blocks import Call, statistics_type
from quadric.optim.layers import Kind, Layer
from quadric.optim.rerun import Found, Rerun, Weights, draws, fused, results, tensors, wanted, weights, with_tensors

_Later = Callable[[int, int], list[Call]]
"""The calls that one call of a module has shown, of the layer at a place and of a pass of a number."""


_UNFUSED = WeakTensorKeyDictionary()
"""Outputs that are in the place of a module's, each with what their products' cotangents arrive at."""


class Capture:
    """Records the calls of the modules of ``layers``.

    A call counts if it is of a module that holds the layer's weight itself, in a forward pass with gradients enabled,
    and if a backward pass comes through it that makes a gradient of the weight (of the bias, where the weight is
    frozen): one for the gradient of something else, such as ``torch.autograd.grad(loss, inputs)``, is none of these.
    Several calls in a pass and several passes, whose gradients are accumulated, are all there. Passes whose gradient
    ``torch.autograd.grad`` returns count where no other pass adds to the weight's. Passes are forgotten where the
    gradient is: after ``zero_grad()``, and where the weight has no gradient as the next pass comes. Calls of no
    examples are no calls.

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
        self._calls: dict[int, list[tuple[int, _Later]]] = {}
        self._passes: dict[int, int] = {}
        self._added: set[int] = set()
        self._serial = itertools.count()
        places = {id(layer.weight): place for place, layer in enumerate(self.layers)}
        hooks = []
        for module in model.modules() if places else ():
            own = weights(module)
            heard = {name: places[id(p)] for name, p in own.items() if id(p) in places and "bias" not in name}
            if heard:
                tap = _Tap(weakref.ref(self), heard)
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
        """The calls since the last time, of the layers that have any.

        Ask for them before the parameters change: passes that must be made again for them are made then.
        """
        calls = _Calls({self.layers[place]: (place, found) for place, found in sorted(self._calls.items())})
        self.clear()
        return calls

    def clear(self) -> None:
        """Forgets what is recorded."""
        self._calls, self._passes, self._added = {}, {}, set()

    def called(
        self, places: Mapping[str, int], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Waits for the gradient at an output; returns another output that is to be in its place, or None."""
        outputs = tensors(output)
        if not torch.is_grad_enabled() or not any(z.requires_grad for z in outputs):
            return None
        if any(torch._C._functorch.is_functorch_wrapped_tensor(z) for z in outputs):
            return None
        own = weights(module)
        places = {name: place for name, place in places.items() if own[name] is self.layers[place].weight}
        if not places:
            return None
        if not fused(module):
            if isinstance(output, Tensor):
                self._plain(places["weight"], module, args[0] if args else kwargs["input"], output)
        elif draws(module) or isinstance(module, nn.RNNCellBase):
            return self._unfused(places, module, own, args, kwargs, output)
        else:
            self._await(places, own, outputs, Rerun(module, own, args, kwargs).cotangents)
        return None

    def _plain(self, place: int, module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        """Of a module that makes one product."""
        layer, inputs = self.layers[place], inputs.detach()
        biased = getattr(module, "bias", None) is layer.bias
        total = _sum(output.detach(), layer) if layer in self._outputs else None

        def arrived(cotangent: Tensor) -> None:
            g = cotangent.detach()
            a, g = (inputs.unsqueeze(0), g.unsqueeze(0)) if inputs.dim() < layer.weight.dim() else (inputs, g)
            if g.numel() and self.listening:
                self._record([place], lambda place, number: [Call(a, g, number, total, biased=biased)])

        output.register_hook(arrived)

    def _unfused(
        self, places: Mapping[str, int], module: nn.Module, own: Weights, args: Any, kwargs: Any, output: Any
    ) -> Any:
        """What is to be in the place of the output, made by products whose cotangents arrive in the same pass."""
        known = _UNFUSED.get(tensors(output)[0])
        if known is not None:  # by the hook of another optimiser
            self._await(places, own, *known)
            return None
        made, products = results(module, own, args, kwargs, draws(module))
        at, found = wanted(products)
        self._await(places, own, at, found)
        rest = iter(made)
        output = with_tensors(output, lambda z: next(rest).to(z.dtype))
        _UNFUSED[tensors(output)[0]] = at, found
        return output

    def _await(
        self,
        places: Mapping[str, int],
        own: Weights,
        at: Sequence[Tensor],
        found: Callable[[Sequence[Tensor | None]], list[Found]],
    ) -> None:
        """Of a module whose products are ``found`` of the gradients at some tensors, when they are asked for."""
        count, names, serial = len(at), {place: name for name, place in places.items()}, next(self._serial)
        biases = {name: own.get(name.replace("weight", "bias")) for name in places}
        newest: list[Any] = [None, lambda: None]

        def record(task: int) -> _Arrived:
            arrived = _Arrived([None] * count, found)
            newest[:] = task, weakref.ref(arrived)

            def later(place: int, number: int) -> list[Call]:
                return self._made(place, names[place], biases[names[place]], arrived, number, serial)

            self._record(names, later)
            return arrived

        def awaited(k: int) -> Callable[[Tensor | None], None]:
            def arrive(cotangent: Tensor | None) -> None:
                if cotangent is not None and cotangent.numel() and self.listening:
                    task = torch._C._current_graph_task_id()
                    arrived = newest[1]() if newest[0] == task else None
                    (arrived or record(task)).cotangents[k] = cotangent.detach()

            return arrive

        for k, z in enumerate(at):
            if z.requires_grad:
                z.register_hook(awaited(k))

    def _made(
        self, place: int, name: str, bias: Tensor | None, arrived: _Arrived, number: int, serial: int
    ) -> list[Call]:
        """The calls that belong to one weight; ``bias`` is what the module has added."""
        calls, layer = [], self.layers[place]
        for product, cotangent in arrived.found:
            if product.name == name:
                runs = list(product.calls(cotangent, len(layer.weight)))
                packed = serial if len(runs) > 1 else None
                for a, g in runs:
                    total = product.total(a, layer.weight, bias) if layer in self._outputs else None
                    calls.append(Call(a, g, number, total, packed, biased=bias is layer.bias))
        return calls

    def _record(self, places: Iterable[int], later: _Later) -> None:
        """Keeps what the calls of one call of a module will be made of, if the pass makes a gradient of the weight."""
        current = torch._C._current_graph_task_id()
        for place in places:
            adds = _adds(self.layers[place])
            if adds is None:
                continue
            begins = current != self._passes.get(place)
            if begins and self.layers[place].weight.grad is None:
                self._calls.pop(place, None)
                self._added.discard(place)
            if adds and place not in self._added:
                self._calls.pop(place, None)
                self._added.add(place)
            if adds or place not in self._added:
                self._passes[place] = current
                found = self._calls.setdefault(place, [])
                found.append((found[-1][0] + begins if found else 0, later))


class _Calls(Mapping[Layer, list[Call]]):
    """The calls of layers, each made when it is asked for, once."""

    def __init__(self, later: Mapping[Layer, tuple[int, list[tuple[int, _Later]]]]) -> None:
        self._later, self._made = later, dict[Layer, list[Call]]()

    def __getitem__(self, layer: Layer) -> list[Call]:
        if layer not in self._made:
            place, found = self._later[layer]
            self._made[layer] = [call for number, made in found for call in made(place, number)]
        return self._made[layer]

    def __iter__(self) -> Iterator[Layer]:
        return iter(self._later)

    def __len__(self) -> int:
        return len(self._later)


class _Arrived:
    """What a backward pass has brought to the tensors that it was awaited at."""

    def __init__(
        self, cotangents: list[Tensor | None], found: Callable[[Sequence[Tensor | None]], list[Found]]
    ) -> None:
        self.cotangents, self._found = cotangents, found

    @cached_property
    def found(self) -> list[Found]:
        """The products and their cotangents."""
        return self._found(self.cotangents)


class _Tap:
    """What a module calls after its forward pass. That of a copied or stored module says nothing to anyone."""

    def __init__(self, capture: Callable[[], Capture | None] = lambda: None, places: Mapping[str, int] = {}) -> None:
        self.capture, self.places = capture, places

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if torch.compiler.is_compiling():
            return None
        capture = self.capture()
        if capture is None or not capture.listening:
            return None
        return capture.called(self.places, module, args, kwargs, output)

    def __reduce__(self) -> tuple[type[_Tap], tuple[()]]:
        return _Tap, ()


def _adds(layer: Layer) -> bool | None:
    """Whether the backward pass that runs adds to the gradient of a layer's weight, of its bias if that is frozen.

    False: ``torch.autograd.grad`` returns it. None: the pass makes none.
    """
    trained = next((p for p in layer.parameters if p.requires_grad), None)
    if trained is None:
        return None
    try:
        return True if torch._C._will_engine_execute_node(get_gradient_edge(trained).node) else None
    except RuntimeError:  # what torch has to say of a leaf whose gradient is returned
        return False


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
    known = fused(module)
    if known is not None:
        return None if known else "its class has a forward pass of its own"
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
