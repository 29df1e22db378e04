"""K-BFGS the slow way: every example and every pixel by itself, inverses by the textbook's formula, in plain loops."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from reference import dense


def patches(module: nn.Module, x: Tensor) -> Tensor:
    """``[positions, entries]``: what each output is a linear map of, with a 1 appended for the bias."""
    if isinstance(module, nn.Conv2d):
        rows = functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
        rows = rows.transpose(1, 2).flatten(0, 1)
    else:
        rows = x.reshape(-1, x.shape[-1])
    return rows if module.bias is None else torch.cat([rows, torch.ones(len(rows), 1, dtype=x.dtype)], 1)


def at_outputs(module: nn.Module, z: Tensor) -> Tensor:
    """``[positions, outputs]``."""
    return z.movedim(1, -1).flatten(0, -2) if isinstance(module, nn.Conv2d) else z.reshape(-1, z.shape[-1])


class Twin:
    """H_a and H_g of one layer, by the steps of Goldfarb, Ren and Bahamou (2020), with averages that start as means.

    Args:
        memory: pairs of H_g, which is built of these each time; None: of all, with H_0 of the first.
        start: statistics before H_a is left to its updates.
    """

    def __init__(self, module: nn.Module, memory: int | None, damping: float, start: int) -> None:
        self.module, self.memory, self.damping, self.start = module, memory, damping**0.5, start
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.units: list[float] = []
        self.seen = 0
        self.H_a = self.A = self.s = self.y = torch.zeros(())
        self.ss = self.yy = torch.zeros(())

    def H_g(self) -> Tensor:
        outputs = len(self.module.weight)
        eye = torch.eye(outputs, dtype=torch.float64)
        if not self.units:
            return eye
        if self.memory is None:
            return dense.bfgs_inverse(eye / self.units[0], self.pairs)
        return dense.bfgs_inverse(eye / self.units[-1], self.pairs[-self.memory :])

    def shifted(self) -> Tensor:
        return self.A + self.damping * self.A.trace() / len(self.A) * torch.eye(len(self.A), dtype=self.A.dtype)

    def first(self, x: Tensor, share: float, refresh: bool) -> None:
        """Before the step."""
        rows = patches(self.module, x)
        self.A = (1 - share) * self.A + share * rows.T @ rows / len(rows)
        self.seen += 1
        if refresh and (self.seen <= self.start or self.H_a.ndim == 0):
            self.H_a = torch.linalg.inv(self.shifted())
        self.mean = rows.mean(0)

    def direction(self, D: Tensor) -> Tensor:
        """Of a gradient ``[outputs, entries]``."""
        return self.H_g() @ D @ self.H_a

    def second(self, z: tuple[Tensor, Tensor], gradients: tuple[Tensor, Tensor], share: float) -> None:
        """After it: outputs, and gradients of the mean loss there, of both passes."""
        means = [at_outputs(self.module, x).mean(0) for x in z]
        sums = [at_outputs(self.module, x).sum(0) for x in gradients]
        s = self.s = (1 - share) * self.s + share * (means[0] - means[1])
        y = self.y = (1 - share) * self.y + share * (sums[0] - sums[1])
        self.ss, self.yy = (1 - share) * self.ss + share * s @ s, (1 - share) * self.yy + share * y @ y
        unit = float((self.yy / self.ss).sqrt())
        if self.memory is not None or not self.pairs:
            self.units.append(unit)
        Hy = self.H_g() @ y
        if s @ y <= 0.2 * y @ Hy:
            theta = 0.8 * (y @ Hy) / (y @ Hy - s @ y)
            s = theta * s + (1 - theta) * Hy
        if s @ y <= self.damping * unit * s @ s:
            theta = (1 - self.damping) * unit * (s @ s) / (unit * (s @ s) - s @ y)
            y = theta * y + (1 - theta) * unit * s
        if s @ y > 1e-4 * (s @ s) * sums[0].norm():
            self.pairs.append((s, y))
        s = self.H_a @ self.mean
        self.H_a = dense.bfgs_inverse(self.H_a, [(s, self.shifted() @ s)])
