"""R^n and the named parameters of a model: two views of the same numbers.

A parameter vector is one 1-D tensor. Whatever has structure (a layer, a block) is a view of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn


class ParameterSpace:
    """The space R^n of a model's trainable parameters, in the order of ``named_parameters``.

    A tied parameter (one tensor under two names) counts once.

    >>> space = ParameterSpace(nn.Linear(2, 3))
    >>> space.size, list(space.names)
    (9, ['weight', 'bias'])
    >>> views = space.views(torch.arange(9.0))
    >>> views["bias"]
    tensor([6., 7., 8.])

    Raises:
        ValueError: the model has no trainable parameter, or its parameters differ in type or device.
    """

    def __init__(self, model: nn.Module) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError(f"model={type(model).__name__} has no trainable parameter: nothing to optimise")
        kinds = {(p.dtype, p.device) for _, p in named}
        if len(kinds) > 1:
            raise ValueError(
                f"model={type(model).__name__} mixes parameters of {sorted(map(str, kinds))}: "
                "move it to one type and device first, for example model.to('cpu', torch.float32)"
            )
        self.names = tuple(name for name, _ in named)
        self.parameters = tuple(p for _, p in named)
        self.dtype, self.device = kinds.pop()
        self._shapes = [p.shape for p in self.parameters]
        self._sizes = [p.numel() for p in self.parameters]
        self.size = sum(self._sizes)

    def point(self) -> Float[Tensor, " n"]:
        """The model's present parameters, copied into one vector."""
        return self.flatten(p.detach() for p in self.parameters)

    def fingerprint(self) -> str:
        """Names, shapes and type of the parameters, and a sum of their bits: models that differ differ in it.

        It reads every parameter once and is no proof: differences may cancel in the sum, by chance alone once in 2^32.
        """
        shapes = ", ".join(f"{name} {list(shape)}" for name, shape in zip(self.names, self._shapes, strict=True))
        return f"{shapes} of {self.dtype}, bits {bits(self.parameters):016x}"

    def flatten(self, tensors: Iterable[Tensor]) -> Float[Tensor, " n"]:
        """One vector from tensors given in the order of ``names``."""
        return torch.cat([t.reshape(-1) for t in tensors])

    def split(self, vector: Float[Tensor, " n"]) -> list[Tensor]:
        """Views of ``vector`` in the shapes of the parameters, in the order of ``names``."""
        if vector.shape != (self.size,):
            raise ValueError(f"vector has shape {tuple(vector.shape)}, this space needs ({self.size},)")
        pieces = vector.split(self._sizes)
        return [piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]

    def views(self, vector: Float[Tensor, " n"]) -> Mapping[str, Tensor]:
        """The same views by name, as ``torch.func.functional_call`` takes them."""
        return dict(zip(self.names, self.split(vector), strict=True))


def bits(tensors: Iterable[Tensor]) -> int:
    """The sum of the bits of tensors of one type, word by word, in 64 bits."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [t.detach().contiguous().view(words[t.dtype.itemsize]).sum() for t in tensors]
    return int(torch.stack(sums).sum()) % 2**64
