"""Sums over the listed paths of a lattice, differentiated by autograd: the twin of the sequence losses."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.functional import jacobian

from quadric.lattice.lattice import Lattice, StatePath
from quadric.loss.sequence_target import Teacher
from reference import accuracy
from reference.lattices import random_lattice

PDFS = 5


def utterance(seed: int, frames: int) -> tuple[Lattice, StatePath, Teacher]:
    """A random one of four pdfs and three phones, and a teacher that lists three of `PDFS` pdfs.

    It leaves most to the others in the first frame, and nothing in the last.
    """
    rng = np.random.default_rng(seed)
    begins = rng.random(frames) < 0.5
    begins[0] = True
    phone = rng.integers(3, size=frames)[np.cumsum(begins) - 1].astype(np.int32)
    reference = StatePath(rng.integers(4, size=frames).astype(np.int32), phone, begins, float(rng.normal()))
    pdfs = np.stack([rng.permutation(PDFS)[:3] for _ in range(frames)]).astype(np.int32)
    teacher = (pdfs, rng.dirichlet(np.ones(3), frames) * np.linspace(0.3, 1.0, frames)[:, None])
    return random_lattice(rng, frames=frames, width=4, density=1.5, phones=3), reference, teacher


class Listed(NamedTuple):
    """Every path's arcs [N, T] and weight [N], and the pdfs it emits [N, T]."""

    arcs: Tensor
    weight: Tensor
    pdf: Tensor

    @classmethod
    def of(cls, lattice: Lattice) -> Listed:
        paths = list(accuracy.lattice_paths(lattice))
        arcs = torch.tensor(paths)
        weight = torch.tensor([accuracy.weight_of(lattice, path) for path in paths], dtype=torch.float64)
        return cls(arcs, weight, torch.from_numpy(lattice.pdf[arcs.numpy()]).long())

    def scores(self, scores: Tensor) -> Tensor:
        """The log score of every path."""
        return self.weight + scores[torch.arange(self.pdf.shape[1]), self.pdf].sum(1)


def scores_of(output: Tensor, log_prior: Tensor, scale: float) -> Tensor:
    """With the softmax's normaliser, which must make no difference."""
    return scale * (torch.log_softmax(output, -1) - log_prior)


def mmi(
    output: Tensor, log_prior: Tensor, scale: float, lattice: Lattice, reference: StatePath, worth: Tensor | None = None
) -> Tensor:
    """log Z minus the reference's score; ``worth``: what is taken off every path of the lattice."""
    scores, paths = scores_of(output, log_prior, scale), Listed.of(lattice)
    totals = paths.scores(scores) - (0.0 if worth is None else worth)
    own = scores[torch.arange(len(scores)), torch.from_numpy(reference.pdf).long()].sum() + reference.weight
    return torch.logsumexp(totals, 0) - own


def risk(output: Tensor, log_prior: Tensor, scale: float, lattice: Lattice, worth: Tensor, most: float) -> Tensor:
    """``most`` minus the mean of what the paths are worth."""
    totals = Listed.of(lattice).scores(scores_of(output, log_prior, scale))
    return most - (torch.softmax(totals, 0) * worth).sum()


def classes(output: Tensor, pdfs: np.ndarray) -> Tensor:
    """The probabilities of a frame [C]: of the pdfs that are listed, and, where there are others, of them together."""
    p, listed = torch.softmax(output, -1), pdfs.tolist()
    others = [p[c] for c in range(len(p)) if c not in listed]
    return torch.stack([p[c] for c in listed] + ([sum(others, torch.zeros(()))] if others else []))


def divergence(output: Tensor, teacher: Teacher) -> Tensor:
    """KL(teacher || model) over these classes, summed over frames."""
    total = output.new_zeros(())
    for x, pdfs, q in zip(output, *teacher, strict=True):
        p, known = classes(x, pdfs), torch.from_numpy(q).double()
        whole = torch.cat([known, 1.0 - known.sum(0, keepdim=True)])[: len(p)]
        total = total + sum(
            (a * (a / b).log() for a, b in zip(whole, p, strict=True) if a > 1e-14), output.new_zeros(())
        )
    return total


def fisher_of_classes(output: Tensor, pdfs: np.ndarray) -> Tensor:
    """The mean of u u' under the model with the gradients u of the classes' log probabilities, of every frame."""
    found = []
    for x, listed in zip(output, pdfs, strict=True):
        p = classes(x, listed)
        slopes = jacobian(lambda z, listed=listed: classes(z, listed).log(), x)
        found.append(torch.einsum("k,kc,kd->cd", p, slopes, slopes))
    return torch.stack(found)


def worths(lattice: Lattice, reference: StatePath, kind: str, silence: tuple[int, ...], one_class: bool) -> Tensor:
    """The accuracy of every path by its definition; ``kind``: state, frame, approximate or exact."""
    wanted = accuracy.segments_of_reference(reference)
    silent_there = np.isin(reference.phone, silence).tolist()
    found = []
    for arcs in accuracy.lattice_paths(lattice):
        at = list(arcs)
        if kind in ("state", "frame"):
            field = "pdf" if kind == "state" else "phone"
            said, right = getattr(lattice, field)[at].tolist(), getattr(reference, field).tolist()
            silent = np.isin(lattice.phone[at], silence).tolist()
            found.append(accuracy.frames_right(said, right, silent, silent_there, one_class))
        else:
            count = accuracy.approximate if kind == "approximate" else accuracy.exact
            found.append(float(count(accuracy.segments_of_path(lattice, arcs), wanted, silence)))
    return torch.tensor(found, dtype=torch.float64)
