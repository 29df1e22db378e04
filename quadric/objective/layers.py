"""Layers linearised once: the two linear maps of a layer at a point, J and J', behind autograd.

The curvature operators differentiate the reverse pass of a model (`quadric.objective.curvature.Linearisation`). For
most functions torch's derivative of the reverse pass is as cheap as it can be. For convolutions it computes more than
is asked for, for recurrent layers it goes step by step where most of the work could be done for all steps at once, for
layer normalisation it takes many passes over memory, and the fused kernels of recurrent layers and attention have none.
Under `linearisable` these functions are replaced, inside, by ones that state J and J' themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from quadric.objective.linear_layer import Layer, Maybe, applied, low_precision
from quadric.objective.recurrent import GRUCell, LSTMCell, ReLUCell, TanhCell, recurrence


class Convolution(Layer):
    """A convolution in any number of dimensions.

    The derivative of torch's own reverse pass computes the cotangent of the weight along with the tangent.
    """

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Maybe, *, stride: Any, padding: Any, dilation: Any, groups: int
    ) -> None:
        self.x, self.weight, self.bias = x, weight, bias
        dims = weight.ndim - 2
        stride, padding, dilation = (_each(option, dims) for option in (stride, padding, dilation))
        self.options = (stride, padding, dilation, False, [0] * dims, groups)  # not transposed: no output padding
        self.outputs = (torch.convolution(x, weight, bias, *self.options),)
        self.shape = self.outputs[0].shape

    def push(self, tangents: Sequence[Maybe]) -> tuple[Tensor, ...]:
        dx, dweight, dbias = tangents
        total: Maybe = None
        if dweight is not None:
            total = torch.convolution(self.x, dweight, dbias, *self.options)
        elif dbias is not None:
            shape = (1, -1, *[1] * (self.weight.ndim - 2))
            total = dbias.view(shape).expand(self.shape)
        if dx is not None:
            inner = torch.convolution(dx, self.weight, None, *self.options)
            total = inner if total is None else inner.add_(total)
        assert total is not None
        return (total,)

    def pull(self, cotangents: Sequence[Maybe], needed: Sequence[bool]) -> tuple[Maybe, ...]:
        (u,) = cotangents
        sizes = None if self.bias is None else list(self.bias.shape)
        wanted = [needed[0], needed[1], needed[2] and self.bias is not None]
        return torch.ops.aten.convolution_backward(u, self.x, self.weight, sizes, *self.options, wanted)


class LayerNorm(Layer):
    """y = xhat * weight + bias with xhat = (x - mean) / deviation, over the last dimensions of ``shape``."""

    def __init__(self, x: Tensor, weight: Maybe, bias: Maybe, *, shape: Sequence[int], eps: float) -> None:
        self.dims = tuple(range(x.ndim - len(shape), x.ndim))
        self.leading = tuple(range(x.ndim - len(shape)))
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        centred = wide - wide.mean(self.dims, keepdim=True)
        self.scale = (centred.square().mean(self.dims, keepdim=True) + eps).rsqrt()
        self.xhat = centred.mul_(self.scale)
        self.weight, self.dtype, self.has_bias = weight, x.dtype, bias is not None
        y = self.xhat.clone() if weight is None else self.xhat * weight
        self.outputs = ((y if bias is None else y + bias).to(self.dtype),)

    def _project(self, v: Tensor) -> Tensor:
        """The symmetric Jacobian of xhat with respect to x."""
        along = (v * self.xhat).mean(self.dims, keepdim=True)
        return torch.addcmul(v - v.mean(self.dims, keepdim=True), self.xhat, along, value=-1).mul_(self.scale)

    def push(self, tangents: Sequence[Maybe]) -> tuple[Tensor, ...]:
        dx, dweight, dbias = tangents
        total: Maybe = None
        if dx is not None:
            total = self._project(dx.to(self.xhat.dtype))
            if self.weight is not None:
                total.mul_(self.weight)
        if dweight is not None:
            total = self.xhat * dweight if total is None else total.addcmul_(self.xhat, dweight)
        if dbias is not None:
            total = dbias.expand_as(self.xhat) if total is None else total.add_(dbias)
        assert total is not None
        return (total.to(self.dtype),)

    def pull(self, cotangents: Sequence[Maybe], needed: Sequence[bool]) -> tuple[Maybe, ...]:
        (u,) = cotangents
        assert u is not None
        u = u.to(self.xhat.dtype)
        dx = None
        if needed[0]:
            dx = self._project(u if self.weight is None else u * self.weight).to(self.dtype)
        dweight = self._summed(u * self.xhat) if needed[1] and self.weight is not None else None
        return dx, dweight, self._summed(u) if needed[2] and self.has_bias else None

    def _summed(self, u: Tensor) -> Tensor:
        return u.sum(self.leading) if self.leading else u


def _each(value: Any, dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


def _convolution(dims: int) -> Callable[..., Any]:
    def convolve(
        input: Tensor, weight: Tensor, bias: Maybe = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
        groups: int = 1,
    ) -> Any:  # fmt: skip
        if input.ndim != dims + 2 or isinstance(padding, str):
            return NotImplemented
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        cast = low_precision(input, weight, bias)
        return applied(lambda *tensors: Convolution(*tensors, **options), *cast)[0]

    return convolve


def _layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Maybe = None, bias: Maybe = None, eps: float = 1e-5,
    *_: Any, **__: Any,
) -> Any:  # fmt: skip
    make = lambda x, w, b: LayerNorm(x, w, b, shape=normalized_shape, eps=eps)  # noqa: E731
    return applied(make, input, weight, bias)[0]


_REPLACED: dict[Any, Callable[..., Any]] = {
    torch.conv1d: _convolution(1),
    torch.conv2d: _convolution(2),
    torch.conv3d: _convolution(3),
    functional.layer_norm: _layer_norm,
    torch.lstm: recurrence(LSTMCell),
    torch.gru: recurrence(GRUCell),
    torch.rnn_tanh: recurrence(TanhCell),
    torch.rnn_relu: recurrence(ReLUCell),
}


class _Linearisable(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        replaced = _REPLACED.get(func)
        if replaced is not None:
            found = replaced(*args, **kwargs)
            if found is not NotImplemented:
                return found
        return func(*args, **kwargs)


class _Unfused(TorchFunctionMode):
    """Recurrent layers of cuDNN have no second derivative; those of oneDNN have. Convolutions keep cuDNN."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu):
            return func(*args, **(kwargs or {}))
        enabled = torch.backends.cudnn.enabled
        torch.backends.cudnn.enabled = False  # not by its context manager, which resets the other flags
        try:
            return func(*args, **(kwargs or {}))
        finally:
            torch.backends.cudnn.enabled = enabled


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Inside, fused kernels whose reverse pass has no derivative give way: cuDNN's recurrent layers, attention."""
    with sdpa_kernel(SDPBackend.MATH), _Unfused():
        yield


@contextmanager
def linearisable() -> Iterator[None]:
    """Inside, torch's functions are recorded so that the reverse pass has a cheap derivative; values do not change."""
    with twice_differentiable(), _Linearisable():
        yield
