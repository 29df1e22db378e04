"""How often a model uses each parameter for one frame of its output, measured by its own forward pass.

A parameter of a recurrent layer is used once per step that reaches the frame, one of a time-delay layer once per place
of its layer that does: the number of its copies in the network unfolded for that frame.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_OF_OUTPUT = (torch.nn.functional.linear, torch.conv1d, torch.conv2d, torch.conv3d, torch.nn.functional.layer_norm)
_OF_INPUT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)


class _Probes(TorchFunctionMode):
    """Adds a zero to what each layer gives (a recurrent one: takes), whose gradient tells which uses reach a frame."""

    def __init__(self, parameters: Mapping[int, str]) -> None:
        super().__init__()
        self.parameters = parameters
        self.uses: list[tuple[set[str], Tensor, bool]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        names = {self.parameters[id(x)] for x in _tensors((args, kwargs)) if id(x) in self.parameters}
        if not names or func not in (*_OF_OUTPUT, *_OF_INPUT):
            return func(*args, **kwargs)
        channels_last = func not in (torch.conv1d, torch.conv2d, torch.conv3d)
        if func in _OF_INPUT:
            probe = torch.zeros_like(args[0], requires_grad=True)
            result = func(args[0] + probe, *args[1:], **kwargs)
        else:
            result = func(*args, **kwargs)
            probe = torch.zeros_like(result, requires_grad=True)
            result = result + probe
        self.uses.append((names, probe, channels_last))
        return result


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [x for item in tree for x in _tensors(item)] if isinstance(tree, (tuple, list)) else []


def uses_per_frame(forward: Callable[[Mapping[str, Tensor]], Tensor], leaves: Mapping[str, Tensor]) -> dict[str, float]:
    """How many uses of each parameter reach the middle frame of the first sequence of ``forward(leaves)``.

    The output is [B, C] or [B, T, C]. Parameters that no known layer takes as they are count once.
    """
    probes = _Probes({id(leaf): name for name, leaf in leaves.items()})
    with torch.enable_grad():
        with probes:
            output = forward(leaves)
        frame = output[0] if output.ndim == 2 else output[0, output.shape[1] // 2]
    cotangent = torch.linspace(1.0, 2.0, len(frame), dtype=frame.dtype, device=frame.device)
    inputs = [probe for _, probe, _ in probes.uses]
    found = torch.autograd.grad(frame, inputs, cotangent, allow_unused=True) if inputs else ()
    counts = dict.fromkeys(leaves, 0.0)
    for (names, _, channels_last), gradient in zip(probes.uses, found, strict=True):
        reached = 0.0 if gradient is None else float((gradient != 0).any(-1 if channels_last else 1).sum())
        for name in names:
            counts[name] += reached
    return {name: max(count, 1.0) for name, count in counts.items()}
