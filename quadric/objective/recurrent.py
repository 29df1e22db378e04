"""Recurrent layers, linearised once.

Only the product with the recurrent weights has to go step by step; those with the inputs, the weights' directions and
the weights' cotangents are one matrix product each over all steps. The notation is torch's: gates from
x W_ih' + b_ih and h W_hh' + b_hh, rows of the weights in torch's order of gates.

Symbols: T steps, B sequences, I inputs, H hidden units, G gates.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from quadric.objective.linear_layer import Layer, Maybe, applied, low_precision


class Cell(Layer):
    """One direction of one recurrent layer over a whole sequence.

    Inputs: x [T, B, I], the weights W_ih [GH, I], W_hh [GH, H], the biases or None, and the first state: h [B, H], for
    the LSTM c as well. Outputs: h at every step [T, B, H], and the last state.
    """

    summed = True
    """Whether the gates see no more than the sum of their two parts, x W_ih' + b_ih and h W_hh' + b_hh."""

    def __init__(self, x: Tensor, W: Tensor, U: Tensor, b: Maybe, c: Maybe, *state: Tensor) -> None:
        self.W, self.U, self.has_bias = W, U, b is not None
        T, B, width = x.shape
        self.seen = torch.cat([x, x.new_empty(T, B, U.shape[1])], 2)
        """x and the h before every step, [T, B, I + H]."""
        self.x, self.previous = self.seen.split([width, U.shape[1]], 2)
        self.outputs = self._run(functional.linear(x, W, b), c, *state)

    @abstractmethod
    def _run(self, inputs: Tensor, c: Maybe, *state: Tensor) -> tuple[Tensor, ...]:
        """The outputs, from the inputs' part of the gates [T, B, GH]; keeps what the linear maps need."""

    @abstractmethod
    def _push(self, inputs: Tensor, hidden: Maybe, *state: Tensor) -> tuple[Tensor, ...]:
        """Tangents of the outputs from those of the gates' parts [T, B, GH], without what h's own tangent adds.

        Where the gates see the sum, ``inputs`` is the sum and ``hidden`` None.
        """

    @abstractmethod
    def _pull(self, u: Maybe, *state: Maybe) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Cotangents of the gates' two parts, and of the first state, from those of the outputs."""

    def push(self, tangents: Sequence[Maybe]) -> tuple[Tensor, ...]:
        dx, dW, dU, db, dc, *state = tangents
        dW, dU = _or_zeros(dW, self.W), _or_zeros(dU, self.U)
        hidden: Maybe = None
        if self.summed:
            bias = db if dc is None else dc if db is None else db + dc
            inputs = functional.linear(self.seen, torch.cat([dW, dU], 1), bias)
        else:
            inputs, hidden = functional.linear(self.x, dW, db), functional.linear(self.previous, dU, dc)
        if dx is not None:
            inputs.flatten(0, 1).addmm_(dx.flatten(0, 1), self.W.T)
        return self._push(inputs, hidden, *(_or_zeros(s, self.previous[0]) for s in state))

    def pull(self, cotangents: Sequence[Maybe], needed: Sequence[bool]) -> tuple[Maybe, ...]:
        inputs, hidden, state = self._pull(*cotangents)
        flat, flat_hidden = inputs.flatten(0, 1), hidden.flatten(0, 1)
        dW = dU = None
        if self.summed and needed[1] and needed[2]:
            dW, dU = (flat.T @ self.seen.flatten(0, 1)).split([self.x.shape[2], self.U.shape[1]], 1)
        else:
            dW = flat.T @ self.x.flatten(0, 1) if needed[1] else None
            dU = flat_hidden.T @ self.previous.flatten(0, 1) if needed[2] else None
        return (
            (flat @ self.W).view(self.x.shape) if needed[0] else None,
            dW,
            dU,
            flat.sum(0) if needed[3] and self.has_bias else None,
            flat_hidden.sum(0) if needed[4] and self.has_bias else None,
            *(s if n else None for s, n in zip(state, needed[5:], strict=True)),
        )


def _or_zeros(tensor: Maybe, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if tensor is None else tensor


class LSTMCell(Cell):
    """c_t = f c_{t-1} + i g;  h_t = o tanh(c_t)."""

    def _run(self, inputs: Tensor, c: Maybe, *state: Tensor) -> tuple[Tensor, ...]:
        h, cell = state
        T, B, H = self.previous.shape
        # Of c_t with respect to the gates i, f, g before their sigmoid or tanh, and of h_t with respect to o.
        self.slopes = inputs.new_empty(T, B, 4, H)
        self.forget, self.through, hidden = (inputs.new_empty(T, B, H) for _ in range(3))
        bias = 0.0 if c is None else c
        for t in range(T):
            self.previous[t] = h
            a = torch.addmm(inputs[t] + bias, h, self.U.T).view(B, 4, H)
            i, f, g, o = *torch.sigmoid(a[:, :2]).unbind(1), torch.tanh(a[:, 2]), torch.sigmoid(a[:, 3])
            slope = self.slopes[t]
            slope[:, 0], slope[:, 1], slope[:, 2] = g * i * (1 - i), cell * f * (1 - f), i * (1 - g * g)
            cell = f * cell + i * g
            squashed = torch.tanh(cell)
            slope[:, 3] = squashed * o * (1 - o)
            self.forget[t], self.through[t] = f, o * (1 - squashed * squashed)
            h = o * squashed
            hidden[t] = h
        return hidden, h, cell

    def _push(self, inputs: Tensor, hidden: Maybe, *state: Tensor) -> tuple[Tensor, ...]:
        dh, dcell = state
        T, B, H = self.previous.shape
        out, transposed = inputs.new_empty(T, B, H), self.U.T
        for t in range(T):
            a = torch.addmm(inputs[t], dh, transposed).view(B, 4, H).mul_(self.slopes[t])
            dcell = torch.addcmul(a[:, 0] + a[:, 1], self.forget[t], dcell).add_(a[:, 2])
            dh = torch.addcmul(a[:, 3], self.through[t], dcell, out=out[t])
        return out, dh.clone(), dcell

    def _pull(self, u: Maybe, *state: Maybe) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        zeros = torch.zeros_like(self.previous[0])
        dh, dcell = (zeros if s is None else s for s in state)
        T, B, H = self.previous.shape
        gates = torch.empty_like(self.slopes)
        for t in reversed(range(T)):
            if u is not None:
                dh = dh + u[t]
            dcell = torch.addcmul(dcell, self.through[t], dh)
            torch.mul(self.slopes[t, :, :3], dcell.unsqueeze(1), out=gates[t, :, :3])
            torch.mul(self.slopes[t, :, 3], dh, out=gates[t, :, 3])
            dh = gates[t].view(B, 4 * H) @ self.U
            dcell = dcell * self.forget[t]
        flat = gates.view(T, B, 4 * H)
        return flat, flat, (dh, dcell)


class GRUCell(Cell):
    """r, z gates;  n = tanh(x part + r * (h part));  h_t = (1 - z) n + z h_{t-1}."""

    summed = False

    def _run(self, inputs: Tensor, c: Maybe, *state: Tensor) -> tuple[Tensor, ...]:
        (h,) = state
        T, B, H = self.previous.shape
        # Of h_t with respect to the gates r, z, n before their sigmoid or tanh, and of n's with respect to its h part.
        self.slopes = inputs.new_empty(T, B, 3, H)
        self.reset, self.keep, hidden = (inputs.new_empty(T, B, H) for _ in range(3))
        for t in range(T):
            self.previous[t] = h
            x, q = inputs[t].view(B, 3, H), functional.linear(h, self.U, c).view(B, 3, H)
            r, z = torch.sigmoid(x[:, :2] + q[:, :2]).unbind(1)
            n = torch.tanh(x[:, 2] + r * q[:, 2])
            slope = self.slopes[t]
            slope[:, 2] = (1 - z) * (1 - n * n)
            slope[:, 0], slope[:, 1] = slope[:, 2] * q[:, 2] * r * (1 - r), (h - n) * z * (1 - z)
            self.reset[t], self.keep[t] = r, z
            h = n + z * (h - n)
            hidden[t] = h
        return hidden, h

    def _push(self, inputs: Tensor, hidden: Maybe, *state: Tensor) -> tuple[Tensor, ...]:
        (dh,) = state
        T, B, H = self.previous.shape
        out = inputs.new_empty(T, B, H)
        assert hidden is not None
        for t in range(T):
            q = torch.addmm(hidden[t], dh, self.U.T).view(B, 3, H)
            q[:, 2].mul_(self.reset[t])
            a = (inputs[t].view(B, 3, H) + q).mul_(self.slopes[t])
            dh = torch.addcmul(a.sum(1), self.keep[t], dh, out=out[t])
        return out, dh.clone()

    def _pull(self, u: Maybe, *state: Maybe) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        dh = torch.zeros_like(self.previous[0]) if state[0] is None else state[0]
        T, B, H = self.previous.shape
        inputs, hidden = torch.empty_like(self.slopes), torch.empty_like(self.slopes)
        for t in reversed(range(T)):
            if u is not None:
                dh = dh + u[t]
            torch.mul(self.slopes[t], dh.unsqueeze(1), out=inputs[t])
            hidden[t] = inputs[t]
            hidden[t, :, 2].mul_(self.reset[t])
            dh = torch.addmm(dh * self.keep[t], hidden[t].view(B, 3 * H), self.U)
        return inputs.view(T, B, 3 * H), hidden.view(T, B, 3 * H), (dh,)


class ElmanCell(Cell):
    """h_t = phi(x part + h part)."""

    @staticmethod
    @abstractmethod
    def _activate(a: Tensor) -> tuple[Tensor, Tensor]:
        """phi and its slope."""

    def _run(self, inputs: Tensor, c: Maybe, *state: Tensor) -> tuple[Tensor, ...]:
        (h,) = state
        self.slopes, hidden = (inputs.new_empty(self.previous.shape) for _ in range(2))
        bias = 0.0 if c is None else c
        for t in range(len(inputs)):
            self.previous[t] = h
            h, self.slopes[t] = self._activate(torch.addmm(inputs[t] + bias, h, self.U.T))
            hidden[t] = h
        return hidden, h

    def _push(self, inputs: Tensor, hidden: Maybe, *state: Tensor) -> tuple[Tensor, ...]:
        (dh,) = state
        out, transposed = inputs.new_empty(self.previous.shape), self.U.T
        for t in range(len(inputs)):
            dh = torch.mul(torch.addmm(inputs[t], dh, transposed), self.slopes[t], out=out[t])
        return out, dh.clone()

    def _pull(self, u: Maybe, *state: Maybe) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        dh = torch.zeros_like(self.previous[0]) if state[0] is None else state[0]
        gates = torch.empty_like(self.slopes)
        for t in reversed(range(len(gates))):
            if u is not None:
                dh = dh + u[t]
            dh = torch.mul(dh, self.slopes[t], out=gates[t]) @ self.U
        return gates, gates, (dh,)


class TanhCell(ElmanCell):
    """phi = tanh."""

    @staticmethod
    def _activate(a: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(a)
        return h, 1 - h * h


class ReLUCell(ElmanCell):
    """phi = max(., 0)."""

    @staticmethod
    def _activate(a: Tensor) -> tuple[Tensor, Tensor]:
        return torch.relu(a), (a > 0).to(a.dtype)


def recurrence(cell: type[Cell]) -> Callable[..., Any]:
    """What stands for ``torch.lstm``, ``torch.gru``, ``torch.rnn_tanh`` or ``torch.rnn_relu``."""

    def run(
        input: Tensor, hx: Any, weights: Any, has_biases: Any, num_layers: Any = None, dropout: float = 0.0,
        train: bool = False, bidirectional: bool = False, batch_first: bool = False,
    ) -> Any:  # fmt: skip
        states = hx if isinstance(hx, (tuple, list)) else (hx,)
        directions = 2 if bidirectional else 1
        each = 4 if has_biases else 2
        if not isinstance(has_biases, bool) or len(weights) != each * num_layers * directions:
            return NotImplemented  # packed sequences, projections
        output, last = (input.transpose(0, 1) if batch_first else input), []
        for layer in range(num_layers):
            outputs = []
            for direction in range(directions):
                place = layer * directions + direction
                W, U, *biases = weights[each * place : each * (place + 1)]
                x = output.flip(0) if direction else output
                cast = low_precision(x, W, U, *(biases or (None, None)), *(s[place] for s in states))
                hidden, *end = applied(cell, *cast)
                outputs.append(hidden.flip(0) if direction else hidden)
                last.append(end)
            output = torch.cat(outputs, -1) if bidirectional else outputs[0]
            if dropout and train and layer < num_layers - 1:
                output = functional.dropout(output, dropout)
        ends = tuple(torch.stack(some) for some in zip(*last, strict=True))
        return (output.transpose(0, 1) if batch_first else output, *ends)

    return run
