"""Gradients in few bytes, for a worker that pushes to a server: what is not sent now is sent later.

A `Compressor` keeps a residue: gradients of which nothing was sent yet. It adds every new one to it, decides what is
sent of the total and keeps the rest (error feedback), so that what was sent and what is left make up all gradients.
The compression ratio, 4 n / `Message.nbytes`, is in true bytes.

Nothing is known here of who is at the other end. The hooks of `quadric.comm.hooks` compress for all ranks of a job.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from quadric.comm.message import Factors, Halves, Message, Signs, Sparse, place_type, tensor

CONVOLUTION_BIN, DENSE_BIN = 50, 500
"""Entries of a bin of `AdaComp`: in kernels of convolutions, and in everything else."""


class _Encode(Protocol):
    def __call__(self, total: Tensor, gradient: Tensor) -> Message: ...


class Compressor(ABC):
    """One worker's end of a compressed push.

    A gradient that is not finite is answered by a message full of NaN, which the receiver refuses as it would refuse
    the gradient itself; the residue stays as it was, and `restore` ignores such a message.

    ``compress`` puts new tensors in the place of those that it keeps: a shallow copy taken before goes on as if nothing
    had been compressed.

    Attributes:
        residue: what is still to be sent; empty before the first gradient.
    """

    def __init__(self) -> None:
        self.residue: Float[Tensor, " n"] = torch.zeros(0)

    @abstractmethod
    def encode(self, total: Float[Tensor, " n"], gradient: Float[Tensor, " n"]) -> Message:
        """What to send of ``total``, the residue with the gradient in it. Nothing is changed."""

    @torch.no_grad()
    def compress(self, gradient: Float[Tensor, " n"]) -> Message:
        """What to send of the residue and this gradient. The rest is kept.

        Raises:
            ValueError: not a floating-point vector, or of another length than before or than the layers.
        """
        return self._compress(gradient, self.encode)

    @torch.no_grad()
    def total(self, gradient: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The residue and this gradient: what could be sent. Nothing is kept.

        Raises:
            ValueError: as of `compress`.
        """
        if gradient.dim() != 1 or not gradient.is_floating_point():
            raise ValueError(f"gradient is {gradient.dtype} {list(gradient.shape)}: give a floating-point vector")
        self._check_length(len(gradient))
        if not len(self.residue):
            self.residue = torch.zeros(len(gradient))
        self.residue = self.residue.to(gradient.device, torch.promote_types(gradient.dtype, self.residue.dtype))
        return self.residue + gradient

    @torch.no_grad()
    def restore(self, message: Message) -> None:
        """Takes back a message of this compressor that was not accepted, as if nothing had been sent.

        Raises:
            ValueError: it is of another length.
        """
        if message.finite:
            self._check_length(message.length)
            if not len(self.residue):
                self.residue = torch.zeros(message.length)
            message.add_to(self.residue, self._returned)

    def state_dict(self) -> dict[str, Any]:
        """All that the next messages depend on."""
        return {"residue": self.residue.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from such a state.

        Raises:
            ValueError: it is of another length.
        """
        self._check_length(len(state["residue"]))
        self.residue = state["residue"].clone()

    _length: int | None = None
    _returned = 1.0

    def _compress(self, gradient: Tensor, encode: _Encode) -> Message:
        total = self.total(gradient)
        finite = total.isfinite()
        if bool(finite.all()):
            message = encode(total, gradient)
            if message.finite:  # and not beyond the range of what travels
                message.add_to(total, -1.0)
                self._keep(total)
                return message
        where = (~finite).to(total.dtype)
        message = encode(where, where)
        message.numbers().fill_(math.nan)
        return message

    def _keep(self, rest: Tensor) -> None:
        self.residue = rest

    def _check_length(self, length: int) -> None:
        known = self._length if self._length is not None else len(self.residue) or None
        if length and known is not None and length != known:
            raise ValueError(f"a vector of {length} entries: this compressor is one of {known}; build one for each")


class AdaComp(Compressor):
    """Adaptive residual gradient compression (Chen et al., AAAI 2018): the sign of what matters in its neighbourhood.

    With the residue R, the gradient dW and G = R + dW, each layer is cut into bins of T entries. An entry is sent where
    a step as large again would make it the largest of its bin B:

        |G_i + dW_i| >= max_{j in B} |G_j|,    sent_i = sign(G_i) s,    s = the mean of max_B |G| over the layer's bins.

    The rule is that of the paper as recalled, not as read: its text could not be had, and these formulas were put
    together from its abstract, from reviews, and by asking what each part is for. G_i + dW_i, a threshold that moves
    with the newest gradient, lets more be sent when gradients are new and less when the residue dominates. A bin of
    zeros sends nothing, nor does an entry that is zero, whatever the threshold.

    An entry costs two bytes (one in bins of at most 255) and a bit, a bin as much as an entry, a layer twelve bytes.

    Args:
        sizes: entries of every layer.
        bin: T, of all layers or one for each: 50 for convolutions, 500 for others; see `bin_lengths`.

    Raises:
        ValueError: sizes or bins out of range.

    >>> compressor = AdaComp([4, 2], bin=2)
    >>> gradient = torch.tensor([1.0, 0.25, -3.0, 0.0, 2.0, 1.0])
    >>> message = compressor.compress(gradient)
    >>> message.dense()
    tensor([ 2.,  0., -2.,  0.,  2.,  2.])
    >>> torch.equal(message.dense() + compressor.residue, gradient)
    True
    """

    def __init__(self, sizes: Sequence[int], bin: int | Sequence[int] = DENSE_BIN) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.bins = (bin,) * len(self.sizes) if isinstance(bin, int) else tuple(bin)
        if not self.sizes or min(self.sizes) < 1 or sum(self.sizes) >= 2**31:
            raise ValueError(f"sizes={list(self.sizes)}: give the entries of every layer, fewer than 2^31 in all")
        if len(self.bins) != len(self.sizes) or not all(1 <= b <= 65_535 for b in self.bins):
            raise ValueError(
                f"bin={bin}: give the entries of a bin, 1 to 65535, or one such number for each of the "
                f"{len(self.sizes)} layers"
            )
        self._length = sum(self.sizes)

    def encode(self, total: Float[Tensor, " n"], gradient: Float[Tensor, " n"]) -> Signs:
        kind = place_type(max(self.bins))
        scales, counts, offsets, negative = [], [], [], []
        layers = zip(total.split(self.sizes), gradient.split(self.sizes), self.bins, strict=True)
        for G, dW, length in layers:
            H = torch.nn.functional.pad(G + dW, (0, -len(G) % length)).view(-1, length)
            G = torch.nn.functional.pad(G, (0, -len(G) % length)).view(-1, length)
            highest = G.abs().amax(1, keepdim=True)
            sent = (H.abs() >= highest) & (G != 0)
            bins, places = sent.nonzero(as_tuple=True)
            scales.append(highest.mean())
            counts.append(bins.bincount(minlength=len(G)))
            offsets.append(places)
            negative.append(G[bins, places] < 0)
        return Signs(
            np.array(self.sizes, np.int32),
            np.array(self.bins, np.int32),
            _floats(torch.stack(scales)),
            _array(torch.cat(counts), kind),
            _array(torch.cat(offsets), kind),
            np.packbits(_array(torch.cat(negative), np.bool_)),
        )


def bin_lengths(parameters: Iterable[Tensor]) -> list[int]:
    """The paper's T for each of a model's parameters: 50 where it is a convolution's kernel, else 500."""
    return [CONVOLUTION_BIN if p.dim() > 2 else DENSE_BIN for p in parameters]


class CLTk(Compressor):
    """The cyclic local top-k of ScaleCom (Chen et al., NeurIPS 2020): all workers send the entries of one of them.

    The leader of a round takes the entries I that are largest in its own m + g; everyone sends (m + g)_I. As all send
    the same ones, sums of messages are messages: what is sent commutes with the sum over workers. Memory is filtered,

        m <- (1 - b) m + b (m + g - sent).

    For b = 1 that is error feedback. A smaller b keeps noise out of the memory at large batches, and forgets: of a
    gradient not sent, 1 - b is lost. That workers lead in turn is read in reviews of the paper, the filter in a port.
    The largest are those of the whole vector: a share of each layer alone was tried on speech and learned far worse.

    Args:
        share: of the entries that are sent: k = share n, rounded, at least one. An entry costs eight bytes.
        memory: b.

    Raises:
        ValueError: not in (0, 1].

    >>> leader, follower = CLTk(0.5), CLTk(0.5)
    >>> first = leader.compress(torch.tensor([1.0, -3.0, 0.5, 2.0]))
    >>> first.dense()
    tensor([ 0., -3.,  0.,  2.])
    >>> follower.compress(torch.tensor([4.0, 3.0, 2.0, 1.0]), first.indices).dense()
    tensor([0., 3., 0., 1.])
    """

    def __init__(self, share: float, memory: float = 1.0) -> None:
        super().__init__()
        if not 0 < share <= 1:
            raise ValueError(f"share={share}: give the part of the entries to send, in (0, 1]")
        if not 0 < memory <= 1:
            raise ValueError(f"memory={memory}: give b of the filter, in (0, 1]; 1 loses nothing")
        self.share, self.memory = share, memory
        self._returned = memory

    @torch.no_grad()
    def compress(
        self, gradient: Float[Tensor, " n"], indices: Int[Tensor, " k"] | Int[np.ndarray, " k"] | None = None
    ) -> Sparse:
        """What to send: the entries at ``indices`` for a follower, and without them the leader's own choice.

        Raises:
            ValueError: as of `Compressor.compress`, or an index outside the vector.
        """
        at = tensor(indices) if isinstance(indices, np.ndarray) else indices
        if at is not None and len(at) and not 0 <= int(at.min()) <= int(at.max()) < len(gradient):
            raise ValueError(f"indices go from {int(at.min())} to {int(at.max())}: give some of {len(gradient)}")
        message = self._compress(gradient, partial(self.encode, indices=at))
        assert isinstance(message, Sparse)
        return message

    def encode(
        self, total: Float[Tensor, " n"], gradient: Float[Tensor, " n"], indices: Int[Tensor, " k"] | None = None
    ) -> Sparse:
        if indices is None:
            indices = largest(total, self.share)
        values = total[indices.to(total.device, torch.int64)]
        return Sparse(len(total), _array(indices, np.int32), _floats(values))

    def _keep(self, rest: Tensor) -> None:
        self.residue = self.residue.lerp(rest, self.memory)


def largest(total: Float[Tensor, " n"], share: float) -> Int[Tensor, " k"]:
    """Where the share of the entries is that is largest in magnitude, at least one, in ascending order."""
    count = min(len(total), max(1, round(share * len(total))))
    return total.abs().topk(count, sorted=False).indices.sort().values


class HalfPrecision(Compressor):
    """Every entry in 16 bits; what rounding takes away is sent later.

    What is too large for the type is sent as its largest number, and the rest stays in the residue too.

    Args:
        dtype: ``torch.float16`` (11 bits of precision, up to 65504) or ``torch.bfloat16`` (8, the range of float32).

    Raises:
        ValueError: another type.

    >>> compressor = HalfPrecision(torch.float16)
    >>> compressor.compress(torch.tensor([66000.0, 2.0])).dense(), compressor.residue
    (tensor([6.5504e+04, 2.0000e+00]), tensor([496.,   0.]))
    """

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        if dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f"dtype={dtype}: give torch.float16 or torch.bfloat16")
        self.kind: Literal["float16", "bfloat16"] = "float16" if dtype == torch.float16 else "bfloat16"

    def encode(self, total: Float[Tensor, " n"], gradient: Float[Tensor, " n"]) -> Halves:
        dtype = getattr(torch, self.kind)
        most = torch.finfo(dtype).max
        bits = total.clamp(-most, most).to(dtype).view(torch.int16).cpu().numpy()
        return Halves(self.kind, bits.view(np.uint16))


class LowRank(Compressor):
    """PowerSGD (Vogels, Karimireddy and Jaggi, NeurIPS 2019, Algorithm 1) of one worker: each matrix by two thin ones.

    For every matrix M of the total, one step of subspace iteration from the last Q (at first, random):

        P <- orthonormal basis of M Q,    Q <- M' P,    sent = P Q'.

    A tensor is taken as the matrix of its first axis by all others. Vectors, and matrices that two factors would not
    make smaller, are sent whole. In the paper the workers sum P and Q on the way; a push is of one worker alone.

    Args:
        shapes: of the tensors that make up the vector.
        rank: of the approximations.
        seed: of the first Q.

    Raises:
        ValueError: the rank is not positive.

    >>> compressor = LowRank([(3, 4), (2,)], rank=1)
    >>> gradient = torch.cat([torch.outer(torch.arange(3.0), torch.ones(4)).view(-1), torch.ones(2)])
    >>> message = compressor.compress(gradient)
    >>> torch.allclose(message.dense(), gradient, atol=1e-6), message.values.size
    (True, 9)
    """

    def __init__(self, shapes: Sequence[Sequence[int]], rank: int, *, seed: int = 0) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank={rank}: give how many columns P and Q have, at least 1")
        if not shapes:
            raise ValueError("shapes is empty: give those of the tensors that make up the vector")
        generator = torch.Generator().manual_seed(seed)
        self.matrices = [_matrix(shape) for shape in shapes]
        self._length = sum(rows * columns for rows, columns in self.matrices)
        ranks = [min(rank, *matrix) for matrix in self.matrices]
        self.ranks = [
            r if r * (rows + columns) < rows * columns else 0
            for r, (rows, columns) in zip(ranks, self.matrices, strict=True)
        ]
        self.Q = [
            torch.randn(columns, r, generator=generator)
            for r, (_, columns) in zip(self.ranks, self.matrices, strict=True)
        ]

    @torch.no_grad()
    def compress(self, gradient: Float[Tensor, " n"]) -> Message:
        message = super().compress(gradient)
        assert isinstance(message, Factors)
        if message.finite:
            self.Q = [
                known if Q is None else Q.clone() for known, (_, (_, Q)) in zip(self.Q, message.pairs(), strict=True)
            ]
        return message

    def encode(self, total: Float[Tensor, " n"], gradient: Float[Tensor, " n"]) -> Factors:
        pieces = total.split([rows * columns for rows, columns in self.matrices])
        values: list[Tensor] = []
        for piece, (rows, columns), rank, Q in zip(pieces, self.matrices, self.ranks, self.Q, strict=True):
            if rank:
                M = piece.view(rows, columns)
                P = torch.linalg.qr(M @ Q.to(M)).Q
                values += [P.reshape(-1), (M.T @ P).reshape(-1)]
            else:
                values.append(piece)
        shapes = [(*matrix, rank) for matrix, rank in zip(self.matrices, self.ranks, strict=True)]
        return Factors(np.array(shapes, np.int32), _floats(torch.cat(values)))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"Q": [Q.clone() for Q in self.Q]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if [Q.shape for Q in state["Q"]] != [Q.shape for Q in self.Q]:
            raise ValueError("state: its Q are of other shapes; load it into a compressor of the same shapes and rank")
        super().load_state_dict(state)
        self.Q = [Q.clone() for Q in state["Q"]]


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor taken as a matrix: a vector is one row."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def _array(x: Tensor, kind: Any) -> np.ndarray:
    return x.cpu().numpy().astype(kind)


def _floats(x: Tensor) -> np.ndarray:
    """Infinite where float32 does not reach."""
    return x.float().cpu().numpy()
