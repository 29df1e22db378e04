"""Recurrence and attention of torch product by product, for the calls that their fused kernels hide.

`torch.nn.LSTM` and its like show a sequence and what becomes of it; the gradient of a weight is a sum over the steps in
between, W a_t + b at step t, of the cotangents there times a_t'. So a module's pass is made again here, of the same
inputs, states and weights, in products that autograd sees. Where every step counts as a position of its example,
Kronecker factors of these calls are the simplest of Martens, Ba and Johnson (2018): steps are independent.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from quadric.optim.blocks import statistics_type

Weights = Mapping[str, Tensor | None]
"""The parameters that a module's pass is made with, by the names of its attributes."""

_FUSED = (nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell, nn.MultiheadAttention)


@dataclass(frozen=True)
class Product:
    """One product z = W a + b of a module, at all its positions.

    Attributes:
        name: of W, an attribute of the module.
        inputs: a, ``[rows, entries]``: of each position the rows of its examples.
        at: what together is ``[rows, width]`` and has the cotangents of z.
        sizes: how many examples each position is of; of packed sequences, the first ones.
        first, width: the outputs of W that z has; all where ``width`` is zero.
    """

    name: str
    inputs: Tensor
    at: Sequence[Tensor]
    sizes: Sequence[int]
    first: int = 0
    width: int = 0

    def calls(self, cotangent: Tensor, outputs: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs ``[N, R, entries]`` and cotangents ``[N, R, outputs]`` of R positions that are of N examples."""
        last = outputs - self.first - cotangent.shape[1]
        start, inputs = 0, self.inputs.detach()
        for size, run in groupby(self.sizes):
            rows = slice(start, start := start + size * len(list(run)))
            a, g = (x[rows].unflatten(0, (-1, size)).transpose(0, 1) for x in (inputs, cotangent))
            yield a, functional.pad(g, (self.first, last)) if self.first or last else g

    def total(self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The sum of z over the positions of ``inputs``; zero in the outputs of W that z has no part of."""
        rows = inputs.flatten(0, -2)
        z = weight.detach().to(rows.dtype) @ rows.sum(0)
        if bias is not None:
            z = z + len(rows) * bias.detach().to(rows.dtype)
        if self.width:
            z[: self.first] = 0
            z[self.first + self.width :] = 0
        return z


Found = tuple[Product, Tensor]
"""A product and its cotangent ``[rows, outputs]``."""

Results = tuple[list[Tensor], list[Product]]
"""The tensors that a module's pass returns, and the products on the way."""


def fused(module: nn.Module) -> bool | None:
    """Whether `weights` and `results` know the module: not if its class has a forward pass of its own.

    None: its kind is another.
    """
    for kind in _FUSED:
        if isinstance(module, kind):
            return type(module).forward is kind.forward
    return None


def weights(module: nn.Module) -> dict[str, Tensor | None]:
    """The present parameters that a module's pass is made with; of one that is not `fused`, its weight, if any."""
    if not fused(module):
        weight = getattr(module, "weight", None)
        return {"weight": weight if isinstance(weight, Tensor) else None}
    if isinstance(module, nn.RNNBase):
        return dict(zip(module._flat_weights_names, module._flat_weights, strict=True))
    if isinstance(module, nn.RNNCellBase):
        return {name: getattr(module, name) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "bias_k", "bias_v")
    found = {name: getattr(module, name) for name in names}
    assert isinstance(module, nn.MultiheadAttention)
    return found | {"out_proj.weight": module.out_proj.weight, "out_proj.bias": module.out_proj.bias}


def draws(module: nn.Module) -> float:
    """The share that the module drops at random inside, in its present mode."""
    inside = isinstance(module, nn.MultiheadAttention) or (isinstance(module, nn.RNNBase) and module.num_layers > 1)
    return float(module.dropout) if inside and module.training else 0.0  # type: ignore[arg-type]


def results(module: nn.Module, own: Weights, args: tuple[Any, ...], kwargs: dict[str, Any], dropout: float) -> Results:
    """A module's pass with the weights ``own``; what it draws, if anything, is drawn anew."""
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
    bound.apply_defaults()
    _, *given = bound.arguments.values()
    if isinstance(module, nn.MultiheadAttention):
        return _attention(module, own, dropout, *given)
    if isinstance(module, nn.RNNBase):
        return _recurrent(module, own, dropout, *given)
    assert isinstance(module, nn.RNNCellBase)
    return _cell(module, own, *given)


def tensors(x: Any) -> list[Tensor]:
    """Those of a module's output, in the order of `results`."""
    if isinstance(x, PackedSequence):
        return [x.data]
    if isinstance(x, tuple | list):
        return [found for part in x for found in tensors(part)]
    return [x] if isinstance(x, Tensor) else []


def with_tensors(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same inputs or outputs with other tensors."""
    if isinstance(x, PackedSequence):
        return x._replace(data=change(x.data))
    if isinstance(x, tuple | list):
        return type(x)(with_tensors(part, change) for part in x)
    if isinstance(x, dict):
        return {name: with_tensors(part, change) for name, part in x.items()}
    return change(x) if isinstance(x, Tensor) else x


class Rerun:
    """A pass that can be made again from what it was called with, and the cotangents of its products then.

    Args:
        module: which draws nothing at random.
        own: its weights.
        args, kwargs: what it was called with.
    """

    def __init__(self, module: nn.Module, own: Weights, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.module, self.own = module, own
        same: dict[int, Tensor] = {}  # one tensor for query, key and value stays one

        def detached(x: Tensor) -> Tensor:
            return same.setdefault(id(x), x.detach())

        self.args, self.kwargs = with_tensors(args, detached), with_tensors(kwargs, detached)

    def cotangents(self, outputs: Sequence[Tensor | None]) -> list[Found]:
        """Those of all products, of those of the outputs; in the type of statistics."""
        like = next(p for p in self.own.values() if p is not None)
        dtype, same = statistics_type(like), dict[int, Tensor]()

        def cast(x: Tensor) -> Tensor:
            return same.setdefault(id(x), x.to(dtype)) if x.is_floating_point() else x

        own = {name: None if p is None else p.detach().to(dtype) for name, p in self.own.items()}
        with torch.enable_grad(), torch.autocast(like.device.type, enabled=False):
            args, kwargs = with_tensors(self.args, cast), with_tensors(self.kwargs, cast)
            made, products = results(self.module, own, args, kwargs, 0.0)
        known = [(z, g.to(dtype)) for z, g in zip(made, outputs, strict=True) if g is not None]
        at, found = wanted(products)
        return found(torch.autograd.grad([z for z, _ in known], at, [g for _, g in known], allow_unused=True))


def wanted(products: Sequence[Product]) -> tuple[list[Tensor], Callable[[Sequence[Tensor | None]], list[Found]]]:
    """The tensors that have the products' cotangents, each once, and what makes of theirs those of the products.

    The latter holds no graph: a hook of these tensors may hold it.
    """
    at = list({id(z): z for product in products for z in product.at}.values())
    places, shapes = {id(z): place for place, z in enumerate(at)}, [z.shape for z in at]
    bare = [(replace(own, inputs=own.inputs.detach(), at=()), [places[id(z)] for z in own.at]) for own in products]

    def found(cotangents: Sequence[Tensor | None]) -> list[Found]:
        pairs = []
        for product, own in bare:
            given = [(cotangents[k], shapes[k]) for k in own]
            parts = [product.inputs.new_zeros(shape) if g is None else g for g, shape in given]
            pairs.append((product, parts[0] if len(parts) == 1 else torch.cat(parts)))
        return pairs

    return at, found


def _seen(z: Tensor) -> Tensor:
    """A product whose cotangent is wanted."""
    return z if z.requires_grad else z.requires_grad_()


def _linear(own: Weights, name: str, x: Tensor) -> Tensor:
    """W x + b; ``name`` of W and b has {} for what they differ in."""
    weight = own[name.format("weight")]
    assert weight is not None
    return _seen(functional.linear(x, weight, own.get(name.format("bias"))))


def _cell(module: nn.RNNCellBase, own: Weights, x: Tensor, hx: Any) -> Results:
    states, batched = _states(hx), x.dim() == 2
    if not batched:
        x, *states = (part.unsqueeze(0) for part in (x, *states))
    if not states:
        states = [x.new_zeros(len(x), module.hidden_size)] * (1 + isinstance(module, nn.LSTMCell))
    _, states, products = _direction(_unit(module), own, "", x, [len(x)], states)
    return [state if batched else state.squeeze(0) for state in states], products


def _recurrent(module: nn.RNNBase, own: Weights, dropout: float, x: Any, hx: Any) -> Results:
    """Layers of one direction or two; of packed sequences the rows of a step are those of the first examples."""
    packed, states = x if isinstance(x, PackedSequence) else None, _states(hx)
    batched = packed is not None or x.dim() == 3
    if packed is not None:
        x, sizes = packed.data, packed.batch_sizes.tolist()
        if packed.sorted_indices is not None:
            states = [state.index_select(1, packed.sorted_indices) for state in states]
    else:
        x = x if batched else x.unsqueeze(1)
        x = x.transpose(0, 1) if batched and module.batch_first else x
        sizes, x = [x.shape[1]] * len(x), x.flatten(0, 1)
        states = states if batched else [state.unsqueeze(1) for state in states]
    directions = 2 if module.bidirectional else 1
    if not states:
        widths = [module.proj_size or module.hidden_size, module.hidden_size][: 1 + isinstance(module, nn.LSTM)]
        states = [x.new_zeros(module.num_layers * directions, sizes[0], width) for width in widths]
    ends, products = [], []
    for layer in range(module.num_layers):
        made = []
        for k in range(directions):
            start = [state[layer * directions + k] for state in states]
            name = f"_l{layer}" + ("_reverse" if k else "")
            out, end, own_products = _direction(_unit(module), own, name, x, sizes, start, reverse=k == 1)
            made.append(out)
            ends.append(end)
            products += own_products
        x = torch.cat(made, 1)
        if dropout and layer < module.num_layers - 1:
            x = functional.dropout(x, dropout)
    states = [torch.stack(parts) for parts in zip(*ends, strict=True)]
    if packed is not None:
        if packed.unsorted_indices is not None:
            states = [state.index_select(1, packed.unsorted_indices) for state in states]
        return [x, *states], products
    x = x.unflatten(0, (len(sizes), -1))
    if not batched:
        return [x.squeeze(1), *(state.squeeze(1) for state in states)], products
    return [x.transpose(0, 1) if module.batch_first else x, *states], products


def _states(hx: Any) -> list[Tensor]:
    return [] if hx is None else [hx] if isinstance(hx, Tensor) else list(hx)


Unit = Callable[[Tensor, Tensor, Sequence[Tensor]], list[Tensor]]
"""The next state, of W_ih x + b_ih, W_hh h + b_hh and the state."""


def _unit(module: nn.RNNBase | nn.RNNCellBase) -> Unit:
    if isinstance(module, nn.LSTM | nn.LSTMCell):
        return _lstm
    if isinstance(module, nn.GRU | nn.GRUCell):
        return _gru
    assert isinstance(module, nn.RNN | nn.RNNCell)
    activation = torch.tanh if module.nonlinearity == "tanh" else torch.relu

    def plain(x: Tensor, h: Tensor, states: Sequence[Tensor]) -> list[Tensor]:
        return [activation(x + h)]

    return plain


def _lstm(x: Tensor, h: Tensor, states: Sequence[Tensor]) -> list[Tensor]:
    i, f, g, o = (x + h).chunk(4, 1)
    c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
    return [o.sigmoid() * c.tanh(), c]


def _gru(x: Tensor, h: Tensor, states: Sequence[Tensor]) -> list[Tensor]:
    (r, u, n), (r_h, u_h, n_h) = x.chunk(3, 1), h.chunk(3, 1)
    n, u = (n + (r + r_h).sigmoid() * n_h).tanh(), (u + u_h).sigmoid()
    return [n + u * (states[0] - n)]


def _direction(
    unit: Unit,
    own: Weights,
    name: str,
    x: Tensor,
    sizes: Sequence[int],
    states: Sequence[Tensor],
    reverse: bool = False,
) -> tuple[Tensor, list[Tensor], list[Product]]:
    """One layer in one direction: its outputs ``[rows, hidden]``, its last states ``[B, ...]`` and its products.

    Where both products of a step are only added, their cotangents are the same.
    """
    z, projection = _linear(own, "{}_ih" + name, x), own.get("weight_hr" + name)
    steps, states = z.split(list(sizes)), list(states)
    before, hidden, whole, outputs = ([z] * len(sizes) for _ in range(4))
    for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        size = sizes[t]
        now = [state[:size] for state in states]
        before[t], hidden[t] = now[0], _linear(own, "{}_hh" + name, now[0])
        after = unit(steps[t], hidden[t], now)
        if projection is not None:
            whole[t], after[0] = after[0], _seen(functional.linear(after[0], projection))
        outputs[t] = after[0]
        rest = [state[size:] for state in states]
        states = [torch.cat(pair) if len(pair[1]) else pair[0] for pair in zip(after, rest, strict=True)]
    products = [
        Product("weight_ih" + name, x, [z], sizes),
        Product("weight_hh" + name, torch.cat(before), hidden if unit is _gru else [z], sizes),
    ]
    if projection is not None:
        products.append(Product("weight_hr" + name, torch.cat(whole), outputs, sizes))
    return torch.cat(outputs), states, products


def _attention(
    module: nn.MultiheadAttention,
    own: Weights,
    dropout: float,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    need_weights: bool,
    mask: Tensor | None,
    average: bool,
    is_causal: bool,
) -> Results:
    batched, same = query.dim() == 3, {id(x): x for x in (query, key, value)}
    for name, x in same.items():
        same[name] = x.unsqueeze(1) if not batched else x.transpose(0, 1) if module.batch_first else x
    (q, k, v), products = _projections(module, own, [same[id(x)] for x in (query, key, value)])
    for ends in ([own["bias_k"], own["bias_v"]], [q.new_zeros(1, 1, 1)] * 2 if module.add_zero_attn else []):
        k, v = (
            x if end is None else torch.cat([x, end.expand(1, *x.shape[1:])])
            for x, end in zip((k, v), ends or (None, None), strict=True)
        )
    L, B, E = q.shape
    if is_causal and padding is None and not need_weights:
        mask = torch.ones(L, len(k), dtype=torch.bool, device=q.device).triu(1)
    bias = _bias([mask, padding], q, len(k), module.num_heads)
    q, k, v = (x.unflatten(2, (module.num_heads, -1)).permute(1, 2, 0, 3) for x in (q, k, v))
    shares = None
    if need_weights:
        scores = (q * q.shape[3] ** -0.5) @ k.mT
        shares = (scores if bias is None else scores + bias).softmax(3)
        shares = functional.dropout(shares, dropout) if dropout else shares
        context = shares @ v
    else:
        context = functional.scaled_dot_product_attention(q, k, v, bias, dropout)
    context = context.permute(2, 0, 1, 3).reshape(L * B, E)
    out = _linear(own, "out_proj.{}", context)
    products.append(Product("out_proj.weight", context, [out], [B] * L))
    made = [out.view(L, B, -1)]
    made = [made[0].squeeze(1) if not batched else made[0].transpose(0, 1) if module.batch_first else made[0]]
    if shares is not None:
        shares = shares.mean(1) if average else shares
        made.append(shares if batched else shares.squeeze(0))
    return made, products


def _projections(
    module: nn.MultiheadAttention, own: Weights, given: Sequence[Tensor]
) -> tuple[list[Tensor], list[Product]]:
    """Query, key and value ``[positions, B, E]``. What is given twice in a row, with one weight, is one product."""
    whole, bias, E = own["in_proj_weight"], own["in_proj_bias"], module.embed_dim
    groups = [len(list(same)) for _, same in groupby(given, id)] if whole is not None else [1, 1, 1]
    made: list[Tensor] = []
    products = []
    for count in groups:
        first, x = len(made), given[len(made)]
        rows = slice(first * E, (first + count) * E)
        name = "in_proj_weight" if whole is not None else f"{'qkv'[first]}_proj_weight"
        weight = own[name] if whole is None else whole[rows]
        assert weight is not None
        z = _seen(functional.linear(x.flatten(0, 1), weight, None if bias is None else bias[rows]))
        part = () if whole is None else (first * E, count * E)
        products.append(Product(name, x.flatten(0, 1), [z], [x.shape[1]] * len(x), *part))
        made += z.unflatten(0, (len(x), -1)).chunk(count, 2)
    return made, products


def _bias(masks: Sequence[Tensor | None], like: Tensor, keys: int, heads: int) -> Tensor | None:
    """What is added to the scores ``[B, heads, L, keys]``; masks do not reach what is appended to the keys.

    Args:
        masks: of queries and keys, ``[L, S]`` or ``[B heads, L, S]``, and of keys, ``[B, S]`` or ``[S]``; what is True
            is hidden, numbers are added.
        like: the queries ``[L, B, E]``.
        keys: how many there are.
        heads: how many there are.
    """
    total, (L, B) = None, like.shape[:2]
    for mask, shape in zip(masks, ((-1, heads, L), (B, 1, 1)), strict=True):
        if mask is None:
            continue
        shape = (1, 1, L) if mask.dim() == 2 and shape[0] == -1 else shape
        added = like.new_zeros(mask.shape).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask
        added = added.to(like.dtype).reshape(*shape, mask.shape[-1])
        added = functional.pad(added, (0, keys - added.shape[-1]))
        total = added if total is None else total + added
    return total
