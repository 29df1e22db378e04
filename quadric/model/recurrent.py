"""Recurrent acoustic models, unfolded over a window of frames: RNN and LSTM.

The score of frame t is that of a recurrent network which starts from zero at frame t - ``left``, takes
``left + 1 + right`` steps and is read at frame t + ``right`` (Haider and Woodland 2021, arXiv 2103.07554: 20 steps,
from 14 frames before to 5 after). It depends on the frames of that window alone, not on the chunk nor on the
minibatch, as it does for the feed-forward models.

All windows of a chunk take their steps together: at step k the window of frame t stands at frame t - left + k - 1, so
the matrix products are as large as the chunk, and what the first layer makes of a frame is computed once and seen by
every window that covers it. A scored frame costs as many steps as the window has; a recurrent network that runs through
the whole utterance would take one, and would score a frame by all those before it.

Every operation is an ordinary one of torch, so curvature products need no code of their own here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from quadric.model.acoustic import (
    FUNCTIONS,
    AcousticModel,
    Activation,
    Norm,
    SplicedLayer,
    check_ends,
    check_layer_options,
    check_sizes,
    initialise,
)

UNFOLDING: tuple[int, int] = (14, 5)
"""Frames before and after the scored one that the recurrent networks of the NGHF experiments see."""

State: TypeAlias = tuple[Tensor, ...]
"""What a layer hands to its next step, ``[B, T, H]`` each: its units, of an LSTM its cells as well."""

_RECURRENT_GAIN = {"relu": math.sqrt(2.0), "sigmoid": 4.0, "tanh": 1.0}
_FORGET_BIAS = 1.0


class RecurrentLayer(nn.Module, ABC):
    """One recurrent layer: units that see the layer below and themselves one step before.

    Args:
        inputs: units below.
        outputs: H.
        gates: G, sums that each unit is made of.
    """

    def __init__(self, inputs: int, outputs: int, gates: int) -> None:
        super().__init__()
        self.input = nn.Linear(inputs, gates * outputs)
        self.recurrent = nn.Linear(outputs, gates * outputs, bias=False)

    def step(self, below: Float[Tensor, "B T GH"], state: State | None) -> State:
        """The state after one more step, from ``input`` of the layer below and the state before, None being zero."""
        total = below if state is None else below + self.recurrent(state[0])
        return self.units(total, state)

    @abstractmethod
    def units(self, total: Float[Tensor, "B T GH"], state: State | None) -> State:
        """The state from the sums and the state before."""


class RNNLayer(RecurrentLayer):
    """h_k = f(W x_k + U h_{k-1} + b).

    U starts orthogonal, times what makes up for the slope of f (relu passes half of the units, a logistic unit a
    quarter at most): a step then keeps the length of what it passes on, in either direction. The contributions of the
    steps are turned against each other and add up in squares, hence W starts by He or Glorot over the square root of
    their number: after the last step the units are of the size of a feed-forward layer's, and a gradient reaches the
    first frame of the window as it does the last.

    Args:
        inputs, outputs: units below and here.
        activation: f.
        steps: how many are taken.
        mean: of the units below.
    """

    def __init__(self, inputs: int, outputs: int, activation: Activation, steps: int, mean: float = 0.0) -> None:
        super().__init__(inputs, outputs, 1)
        self.activation = activation
        W, U = self.input.weight, self.recurrent.weight
        initialise(W, activation)
        nn.init.orthogonal_(U, gain=_RECURRENT_GAIN[activation])
        with torch.no_grad():
            W.div_(math.sqrt(steps))
            own = 0.5 if activation == "sigmoid" else 0.0
            self.input.bias.copy_(-mean * W.sum(dim=1) - own * U.sum(dim=1))

    def units(self, total: Float[Tensor, "B T H"], state: State | None) -> State:
        return (FUNCTIONS[self.activation](total),)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class LSTMLayer(RecurrentLayer):
    """c_k = f c_{k-1} + i g, h_k = o tanh(c_k) (Hochreiter and Schmidhuber 1997, with the forget gate of Gers 2000).

    The gates i, f, o are logistic units, g is tanh; the rows of the weights are in torch's order i, f, g, o. Weights
    start by Glorot, the recurrent ones orthogonal, gate by gate. The forget gates start at a bias of 1 (Jozefowicz et
    al. 2015): a cell keeps 0.73 of itself a step and not 0.5, so that of what the first of 20 frames put into it, and
    of the gradient on the way back, 1/400 is left and not 1/500,000.

    Args:
        inputs, outputs: units below and here.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 4)
        with torch.no_grad():
            for gate in self.input.weight.chunk(4):
                nn.init.xavier_uniform_(gate)
            for gate in self.recurrent.weight.chunk(4):
                nn.init.orthogonal_(gate)
            nn.init.zeros_(self.input.bias)
            self.input.bias.chunk(4)[1].fill_(_FORGET_BIAS)

    def units(self, total: Float[Tensor, "B T 4H"], state: State | None) -> State:
        i, f, g, o = total.chunk(4, dim=-1)
        new = torch.sigmoid(i) * torch.tanh(g)
        # A cell is a sum over the steps: under autocast the gates are of low precision, it is not.
        new = new.to(torch.promote_types(new.dtype, torch.float32))
        cell = new if state is None else torch.sigmoid(f) * state[1] + new
        return (torch.sigmoid(o) * torch.tanh(cell).to(o.dtype), cell)


class Unfolded(nn.Module):
    """Recurrent layers, one above the other, started from zero in every window of ``steps`` frames and read at its end.

    Dropout is of what a layer hands to the next one, anew at every step; what it hands to itself is kept.

    >>> Unfolded([LSTMLayer(3, 4), LSTMLayer(4, 5)], steps=6, dropout=0.0)(torch.zeros(2, 5 + 7, 3)).shape
    torch.Size([2, 7, 5])
    """

    def __init__(self, layers: Sequence[RecurrentLayer], steps: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.dropout = nn.Dropout(dropout)
        self.steps = steps

    def forward(self, x: Float[Tensor, "B frames D"]) -> Float[Tensor, "B T H"]:
        bottom, *above = cast("list[RecurrentLayer]", list(self.layers))
        frames = bottom.input(x)
        windows = x.shape[1] - self.steps + 1
        states: list[State | None] = [None] * len(self.layers)
        h = x
        for step in range(self.steps):
            state = states[0] = bottom.step(frames[:, step : step + windows], states[0])
            h = self.dropout(state[0])
            for number, layer in enumerate(above, start=1):
                state = states[number] = layer.step(layer.input(h), states[number])
                h = self.dropout(state[0])
        return h

    def extra_repr(self) -> str:
        return f"steps={self.steps}"


class RNN(AcousticModel):
    """Recurrent layers unfolded over a window of frames, feed-forward layers above them, a linear output.

    Args:
        inputs: D, features per frame.
        outputs: C, classes.
        sizes: units of each recurrent layer.
        feed_forward: units of each layer above them.
        window: frames before and after the scored one that the recurrent layers run through, ``(left, right)``.
        activation: of all hidden layers.
        dropout: probability, while training, of dropping what a hidden unit hands to the layer above.
        norm: ``"layer"`` normalises the units of each frame before the activation, in the feed-forward layers alone: in
            a recurrent one it would act anew at every step, and make it another network.

    >>> model = RNN(40, 100, [64, 64], feed_forward=[64])
    >>> model.left_context, model.right_context
    (14, 5)
    >>> model(torch.zeros(2, 14 + 7 + 5, 40)).shape
    torch.Size([2, 7, 100])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        sizes: Sequence[int],
        *,
        feed_forward: Sequence[int] = (),
        window: tuple[int, int] = UNFOLDING,
        activation: Activation = "relu",
        dropout: float = 0.0,
        norm: Norm = "none",
    ) -> None:
        check_ends(inputs, outputs)
        check_recurrent(sizes, feed_forward, window, activation, dropout, norm)
        steps = sum(window) + 1
        mean = 0.5 if activation == "sigmoid" else 0.0
        layers = [RNNLayer(inputs, sizes[0], activation, steps)]
        layers += [RNNLayer(low, high, activation, steps, mean) for low, high in pairwise(sizes)]
        above = _feed_forward((sizes[-1], *feed_forward), activation, dropout, norm)
        if activation == "sigmoid":
            for layer in above:
                layer.centre(mean)
        hidden = [Unfolded(layers, steps, dropout), *above]
        super().__init__(inputs, outputs, hidden, (*sizes, *feed_forward)[-1], window)


class LSTM(AcousticModel):
    """LSTM layers unfolded over a window of frames, feed-forward layers above them, a linear output.

    Args:
        activation: of the feed-forward layers.
        inputs, outputs, sizes, feed_forward, window, dropout, norm: as for ``RNN``.

    >>> LSTM(40, 100, [64, 64], feed_forward=[64])(torch.zeros(2, 14 + 7 + 5, 40)).shape
    torch.Size([2, 7, 100])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        sizes: Sequence[int],
        *,
        feed_forward: Sequence[int] = (),
        window: tuple[int, int] = UNFOLDING,
        activation: Activation = "relu",
        dropout: float = 0.0,
        norm: Norm = "none",
    ) -> None:
        check_ends(inputs, outputs)
        check_recurrent(sizes, feed_forward, window, activation, dropout, norm)
        layers = [LSTMLayer(low, high) for low, high in pairwise((inputs, *sizes))]
        above = _feed_forward((sizes[-1], *feed_forward), activation, dropout, norm)
        if activation == "sigmoid":
            for layer in above[1:]:
                layer.centre(0.5)
        hidden = [Unfolded(layers, sum(window) + 1, dropout), *above]
        super().__init__(inputs, outputs, hidden, (*sizes, *feed_forward)[-1], window)


def _feed_forward(widths: Sequence[int], activation: Activation, dropout: float, norm: Norm) -> list[SplicedLayer]:
    return [SplicedLayer(low, high, (0,), activation, dropout, norm) for low, high in pairwise(widths)]


def check_recurrent(
    sizes: Sequence[int],
    feed_forward: Sequence[int],
    window: tuple[int, int],
    activation: str,
    dropout: float,
    norm: str,
) -> None:
    """Raises ``ValueError`` if no recurrent network has such hidden layers or such a window."""
    check_sizes(sizes)
    if any(size < 1 for size in feed_forward):
        raise ValueError(
            f"feed_forward is {list(feed_forward)}; give the units of each layer, at least one, or no layer"
        )
    if len(window) != 2 or min(window) < 0:
        raise ValueError(f"window is {window!r}; give how many frames before and after, neither negative")
    if sum(window) == 0:
        raise ValueError(f"window is {window!r}; one step has nothing to recur to: give more frames, or choose a DNN")
    check_layer_options(activation, dropout, norm)
