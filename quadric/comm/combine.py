"""Ways to make one gradient of several workers' that are more than the mean.

The mean is right for gradients at one point. Steps that workers took one after the other would add up where they go
different ways, and not where they go the same: so do these combiners.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def adasum(gradients: Sequence[Float[Tensor, " n"]]) -> Float[Tensor, " n"]:
    """AdaSum (Maleki et al., MLSys 2021): pair by pair, in a tree.

        (1 - g1'g2 / (2 |g1|^2)) g1 + (1 - g1'g2 / (2 |g2|^2)) g2

    of two gradients: their sum where they are orthogonal, themselves where they are equal, and the same in either
    order. More are halved, each half is combined, and then the two. Which are in one half matters; the order within a
    pair, and of the halves, does not. A gradient of zeros changes nothing.

    Raises:
        ValueError: no gradients, or not vectors of one length.

    >>> adasum([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])])
    tensor([1., 2.])
    >>> adasum([torch.tensor([1.0, 2.0])] * 3)
    tensor([1., 2.])
    """
    _check(gradients)
    return _tree(gradients)


def graph_any2vec(gradients: Sequence[Float[Tensor, " n"]]) -> Float[Tensor, " n"]:
    """The model combiner of GraphAny2Vec (Gill et al., arXiv 1909.03359): to the first, what is new in each other.

        g <- g + g_i - (g'g_i / |g|^2) g

    for one gradient after the other: only what is orthogonal to all that was combined before is added. It depends on
    the order. Of the paper the abstract was read; the formula is recalled.

    Raises:
        ValueError: no gradients, or not vectors of one length.

    >>> graph_any2vec([torch.tensor([1.0, 0.0]), torch.tensor([5.0, 2.0])])
    tensor([1., 2.])
    """
    _check(gradients)
    combined = gradients[0].clone()
    for gradient in gradients[1:]:
        combined = combined + gradient - _share(gradient, combined) * combined
    return combined


def _tree(gradients: Sequence[Tensor]) -> Tensor:
    if len(gradients) == 1:
        return gradients[0].clone()
    half = (len(gradients) + 1) // 2
    left, right = _tree(gradients[:half]), _tree(gradients[half:])
    return (1 - _share(right, left) / 2) * left + (1 - _share(left, right) / 2) * right


def _share(x: Tensor, of: Tensor) -> Tensor:
    """x'of / |of|^2, zero for a zero vector, in float64: squares of small float32 numbers vanish in float32."""
    of64 = of.double()
    squared = of64 @ of64
    return torch.where(squared > 0, (x.double() @ of64) / squared, 0.0).to(of.dtype)


def _check(gradients: Sequence[Tensor]) -> None:
    shapes = {tuple(g.shape) for g in gradients}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1:
        raise ValueError(f"gradients have the shapes {sorted(shapes)}: give vectors of one length, at least one")
