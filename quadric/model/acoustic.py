"""Acoustic models, the feed-forward ones among them (DNN, TDNN), and the hybrid use of their outputs.

Context is *valid*: a model consumes ``left_context`` frames before and ``right_context`` frames after the frames
it scores and never pads. The data supplies them, true neighbours inside an utterance and repeated edge frames
outside, so the score of a frame depends neither on the chunk nor on the minibatch it came in.

Every operation works under ``torch.func.functional_call``, double backward and ``torch.func.jvp``, so curvature
products need no code of their own here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

Activation: TypeAlias = Literal["relu", "sigmoid", "tanh"]
Norm: TypeAlias = Literal["layer", "none"]

SHIFTS: tuple[tuple[int, ...], ...] = ((-2, -1, 0, 1, 2), (-1, 2), (-3, 3), (-7, 2), (0,))
"""The shifts of the five-layer TDNN of Haider and Woodland's NGHF experiments (arXiv 2103.07554)."""

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
"""The activations by name."""
# The slope of a logistic unit is at most a quarter: four times wider weights keep the signal alive through the layers.
_GLOROT_GAIN = {"sigmoid": 4.0, "tanh": 1.0}
_OUTPUT_GAIN = 0.1
NORM_FLOOR = 0.1
"""What layer normalisation adds to the variance of a frame's units.

Where the whole window of a layer is masked or silent in the same way, the units hardly vary, and torch's 1e-5 would
blow up what is left of them, and every gradient through them, 300 times.
"""


def initialise(weight: Tensor, activation: Activation) -> None:
    """Draws the weights of a layer before an ``activation``: by He (relu) or Glorot (sigmoid, tanh)."""
    if activation == "relu":
        nn.init.kaiming_normal_(weight, nonlinearity="relu")
    else:
        nn.init.xavier_uniform_(weight, gain=_GLOROT_GAIN[activation])


def splice(x: Float[Tensor, "B frames D"], offsets: Sequence[int]) -> Float[Tensor, "B T D*n"]:
    """Concatenates, for every frame that has them all, the ``n`` frames at ``offsets`` (ascending) from it.

    >>> splice(torch.arange(5.0).view(1, 5, 1), (-1, 2))
    tensor([[[0., 3.],
             [1., 4.]]])
    """
    first = offsets[0]
    length = x.shape[1] - (offsets[-1] - first)
    views = [x[:, offset - first : offset - first + length] for offset in offsets]
    return views[0] if len(views) == 1 else torch.cat(views, dim=-1)


class SplicedLayer(nn.Module):
    """One hidden layer: splice, linear, normalise, activate, drop out."""

    def __init__(
        self, inputs: int, outputs: int, offsets: Sequence[int], activation: Activation, dropout: float, norm: Norm
    ) -> None:
        super().__init__()
        self.offsets = tuple(offsets)
        self.activation = activation
        self.linear = nn.Linear(inputs * len(self.offsets), outputs)
        self.norm = nn.LayerNorm(outputs, eps=NORM_FLOOR) if norm == "layer" else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        initialise(self.linear.weight, activation)
        nn.init.zeros_(self.linear.bias)

    @torch.no_grad()
    def centre(self, mean: float) -> None:
        """Sets the bias so that inputs around ``mean`` start each unit around zero, where its slope is largest."""
        self.linear.bias.copy_(-mean * self.linear.weight.sum(dim=1))

    def forward(self, x: Float[Tensor, "B frames D"]) -> Float[Tensor, "B T H"]:
        return self.dropout(FUNCTIONS[self.activation](self.norm(self.linear(splice(x, self.offsets)))))

    def extra_repr(self) -> str:
        return f"offsets={self.offsets}, activation={self.activation!r}"


class AcousticModel(nn.Module):
    """Hidden layers over the frames around each frame, then a layer that is linear in what they make of it.

    The output layer starts small, so that training starts near the uniform distribution, or near the priors after
    ``initialise_output_bias``.

    Args:
        inputs: D, features per frame.
        outputs: C, classes.
        hidden: layers on ``[B, frames, units]``, the lowest first; together they use up ``context``.
        width: units of the last of them.
        context: frames that a score needs before and after its own.

    Attributes:
        left_context, right_context: frames needed before the first and after the last scored frame, exactly.
    """

    def __init__(
        self, inputs: int, outputs: int, hidden: Iterable[nn.Module], width: int, context: tuple[int, int]
    ) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.left_context, self.right_context = context
        self.hidden = nn.ModuleList(hidden)
        self.output = nn.Linear(width, outputs)
        nn.init.xavier_uniform_(self.output.weight, gain=_OUTPUT_GAIN)
        nn.init.zeros_(self.output.bias)

    def forward(self, inputs: Float[Tensor, "B left+T+right D"]) -> Float[Tensor, "B T C"]:
        """Logits of the ``T`` frames that have their full context.

        Raises:
            ValueError: the input is not ``[B, frames, D]`` or has no frame with a full context.
        """
        self._check_input(inputs)
        x = inputs
        for layer in self.hidden:
            x = layer(x)
        return self.output(x)

    @torch.no_grad()
    def initialise_output_bias(self, log_prior: Float[Tensor, " C"]) -> None:
        """Starts the output layer at the log-priors: an untrained network then predicts the priors.

        Raises:
            ValueError: not one finite value per output.
        """
        _check_log_prior(log_prior, self.outputs)
        self.output.bias.copy_(log_prior)

    def _check_input(self, inputs: Tensor) -> None:
        if inputs.dim() != 3 or inputs.shape[2] != self.inputs:
            raise ValueError(f"inputs has shape {tuple(inputs.shape)}; give [B, frames, {self.inputs}]")
        needed = self.left_context + 1 + self.right_context
        if inputs.shape[1] < needed:
            raise ValueError(
                f"inputs has {inputs.shape[1]} frames; scoring one frame takes {needed} "
                f"({self.left_context} left, {self.right_context} right): pad the features with their edge frames"
            )

    def extra_repr(self) -> str:
        return f"left_context={self.left_context}, right_context={self.right_context}"


class TDNN(AcousticModel):
    """A time-delay network (Peddinti et al. 2015): each hidden layer sees the frames below it at its offsets.

    Hidden layer ``l`` has ``sizes[l]`` units over the frames at ``offsets[l]`` of the layer below; the output layer
    is linear in the current frame. Weights start by He (relu) or Glorot (sigmoid, tanh).

    Args:
        inputs: D, features per frame.
        outputs: C, classes.
        sizes: units of each hidden layer.
        offsets: one ascending sequence per hidden layer, reaching from at most 0 to at least 0.
        activation: of every hidden layer.
        dropout: probability of dropping a hidden unit while training.
        norm: ``"layer"`` normalises the units of each frame before the activation.

    >>> model = TDNN(40, 100, [64] * 5)
    >>> model.left_context, model.right_context
    (13, 9)
    >>> model(torch.zeros(2, 13 + 7 + 9, 40)).shape
    torch.Size([2, 7, 100])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        sizes: Sequence[int],
        *,
        offsets: Sequence[Sequence[int]] = SHIFTS,
        activation: Activation = "relu",
        dropout: float = 0.0,
        norm: Norm = "none",
    ) -> None:
        check_ends(inputs, outputs)
        check_layers(sizes, offsets, activation, dropout, norm)
        below = (inputs, *sizes[:-1])
        layers = [
            SplicedLayer(low, high, shifts, activation, dropout, norm)
            for low, high, shifts in zip(below, sizes, offsets, strict=True)
        ]
        if activation == "sigmoid":
            for layer in layers[1:]:
                layer.centre(0.5)
        context = (-sum(shifts[0] for shifts in offsets), sum(shifts[-1] for shifts in offsets))
        super().__init__(inputs, outputs, layers, sizes[-1], context)


class DNN(TDNN):
    """A fully connected network on a window of frames: a TDNN that splices once, at its input.

    Args:
        context: frames before and after the current one as ``(left, right)``, or one number for both.
        inputs, outputs, sizes, activation, dropout, norm: as for ``TDNN``.

    >>> DNN(40, 100, [64, 64], context=10)(torch.zeros(2, 10 + 7 + 10, 40)).shape
    torch.Size([2, 7, 100])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        sizes: Sequence[int],
        *,
        context: tuple[int, int] | int = (0, 0),
        activation: Activation = "relu",
        dropout: float = 0.0,
        norm: Norm = "none",
    ) -> None:
        left, right = (context, context) if isinstance(context, int) else context
        if left < 0 or right < 0:
            raise ValueError(f"context is {context!r}; give how many frames before and after, neither negative")
        window = tuple(range(-left, right + 1))
        offsets = [window] + [(0,)] * (len(sizes) - 1)
        super().__init__(inputs, outputs, sizes, offsets=offsets, activation=activation, dropout=dropout, norm=norm)


def log_priors(counts: Float[Tensor, " C"], *, floor: float = 1e-5) -> Float[Tensor, " C"]:
    """Log relative frequencies of the classes, none below ``floor`` before renormalising.

    The floor matters: a class absent from the alignments has prior zero, and dividing by it would make that class
    win every frame.

    Raises:
        ValueError: counts that are negative or all zero, or a floor outside (0, 1).

    >>> log_priors(torch.tensor([3.0, 1.0, 0.0]), floor=0.25).exp()
    tensor([0.6000, 0.2000, 0.2000])
    """
    if counts.dim() != 1 or not bool((counts >= 0).all()) or not bool(counts.sum() > 0):
        raise ValueError("counts must be one non-negative number per class, not all zero: count the aligned frames")
    if not 0 < floor < 1:
        raise ValueError(f"floor is {floor}; give a small positive probability such as 1e-5")
    real = counts if counts.is_floating_point() else counts.double()
    prior = (real / real.sum()).clamp(min=floor)
    return (prior / prior.sum()).log()


def log_likelihoods(logits: Float[Tensor, "*B T C"], log_prior: Float[Tensor, " C"]) -> Float[Tensor, "*B T C"]:
    """Scaled acoustic log-likelihoods of a hybrid system (Bourlard and Morgan 1994).

    By Bayes' rule ``log p(x|c) = log p(c|x) - log p(c) + log p(x)``; the last term is the same for every class and is
    left out. Floor the priors first, as ``log_priors`` does.

    Raises:
        ValueError: ``log_prior`` is not one finite value per class.
    """
    _check_log_prior(log_prior, logits.shape[-1])
    return torch.log_softmax(logits, dim=-1) - log_prior


def _check_log_prior(log_prior: Tensor, classes: int) -> None:
    if tuple(log_prior.shape) != (classes,):
        raise ValueError(f"log_prior has shape {tuple(log_prior.shape)}; give one value for each of {classes} classes")
    if not bool(log_prior.isfinite().all()):
        missing = int((~log_prior.isfinite()).sum())
        raise ValueError(
            f"log_prior is not finite for {missing} of {classes} classes; floor it with log_priors(counts)"
        )


def check_ends(inputs: int, outputs: int) -> None:
    """Raises ``ValueError`` if a model has nothing to take or nothing to give."""
    if inputs < 1 or outputs < 1:
        raise ValueError(f"inputs is {inputs} and outputs is {outputs}; both must be at least 1")


def check_layers(
    sizes: Sequence[int], offsets: Sequence[Sequence[int]], activation: str, dropout: float, norm: str
) -> None:
    """Raises ``ValueError`` if no network has such hidden layers."""
    check_sizes(sizes)
    _check_offsets(offsets, len(sizes))
    check_layer_options(activation, dropout, norm)


def check_sizes(sizes: Sequence[int]) -> None:
    """Raises ``ValueError`` if there is no layer, or one without units."""
    if len(sizes) == 0 or any(size < 1 for size in sizes):
        raise ValueError(f"sizes is {list(sizes)}; give the units of each hidden layer, at least one layer of one unit")


def _check_offsets(offsets: Sequence[Sequence[int]], layers: int) -> None:
    if len(offsets) != layers:
        raise ValueError(f"offsets has {len(offsets)} rows for {layers} hidden layers; give one row per layer")
    for number, shifts in enumerate(offsets):
        if len(shifts) == 0 or any(a >= b for a, b in pairwise(shifts)):
            raise ValueError(f"offsets[{number}] is {list(shifts)}; give ascending, distinct frame offsets")
        if shifts[0] > 0 or shifts[-1] < 0:
            raise ValueError(f"offsets[{number}] is {list(shifts)}; it must reach from at most 0 to at least 0")


def check_layer_options(activation: str, dropout: float, norm: str) -> None:
    """Raises ``ValueError`` if no hidden layer has such options."""
    if activation not in FUNCTIONS:
        raise ValueError(f"activation is {activation!r}; choose one of {', '.join(FUNCTIONS)}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; give a probability in [0, 1)")
    if norm not in ("layer", "none"):
        raise ValueError(f"norm is {norm!r}; choose 'layer' or 'none'")
