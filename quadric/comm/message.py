"""What travels of a gradient: NumPy arrays that say which vector is meant, in fewer bytes.

Arrays go through pickle protocol 5 without being copied. A message is checked whenever it is built, and unpickling
builds it, so one that was damaged or forged on its way is refused on receipt: it can name no entry outside the vector.
Whether its numbers are finite is another question, answered by `Message.finite`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int32, UInt8, UInt16
from torch import Tensor

SMALL = 255
"""The longest bin whose counts and offsets take a byte each."""


class Message(ABC):
    """A vector, encoded. Subclasses are frozen dataclasses of arrays, and of what tells how to read them."""

    @property
    @abstractmethod
    def length(self) -> int:
        """n, of the vector."""

    @abstractmethod
    def numbers(self) -> Tensor:
        """All floating-point numbers of the message, as the arrays hold them: a view where they may be written."""

    @abstractmethod
    def _add_to(self, out: Tensor, scale: float) -> None:
        """Adds to a vector of the right length."""

    @property
    def nbytes(self) -> int:
        """Of the arrays; an envelope (pickle's takes some 200 bytes) is not in it."""
        return sum(a.nbytes for a in self._values() if isinstance(a, np.ndarray))

    @property
    def finite(self) -> bool:
        """Whether all numbers are."""
        return bool(self.numbers().isfinite().all())

    def add_to(self, out: Float[Tensor, " n"], scale: float = 1.0) -> None:
        """``out += scale * vector``.

        Raises:
            ValueError: ``out`` is not a floating-point vector of this length.
        """
        if out.shape != (self.length,) or not out.is_floating_point():
            raise ValueError(
                f"out is {out.dtype} {list(out.shape)}: this message is of {self.length} floating-point numbers"
            )
        self._add_to(out, scale)

    def dense(self) -> Float32[Tensor, " n"]:
        """The vector. It is as long as the message says: who does not trust the sender adds it to one of his own."""
        out = torch.zeros(self.length)
        self._add_to(out, 1.0)
        return out

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._values()


@dataclass(frozen=True, eq=False)
class Sparse(Message):
    """Some entries, the others being zero.

    >>> message = Sparse(4, np.array([1, 3], np.int32), np.array([0.5, 2.0], np.float32))
    >>> message.dense(), message.nbytes
    (tensor([0.0000, 0.5000, 0.0000, 2.0000]), 16)
    >>> Sparse(3, message.indices, message.values)
    Traceback (most recent call last):
    ...
    ValueError: indices go from 1 to 3: the vector has 3 entries

    Raises:
        ValueError: arrays of other types or lengths, or an index outside the vector.
    """

    size: int
    indices: Int32[np.ndarray, " k"]
    values: Float32[np.ndarray, " k"]

    def __post_init__(self) -> None:
        if type(self.size) is not int or not 0 <= self.size < 2**31:
            raise ValueError(f"size is {self.size!r}: give the length of the vector, below 2^31")
        _check_array("indices", self.indices, np.int32)
        _check_array("values", self.values, np.float32, len(self.indices))
        if len(self.indices):
            low, high = int(self.indices.min()), int(self.indices.max())
            if low < 0 or high >= self.size:
                raise ValueError(f"indices go from {low} to {high}: the vector has {self.size} entries")

    @property
    def length(self) -> int:
        return self.size

    def numbers(self) -> Tensor:
        return tensor(self.values)

    def _add_to(self, out: Tensor, scale: float) -> None:
        _add_entries(out, self.indices, self.numbers(), scale)


@dataclass(frozen=True, eq=False)
class Signs(Message):
    """Some entries of each layer, by their places in bins and their signs, all of the layer's one magnitude.

    A layer of s entries has ceil(s / bin) bins, the last of which may be shorter.

    Attributes:
        sizes, bins, scales: of every layer: entries, entries of a bin, the magnitude.
        counts: of every bin, the layers' one after the other: how many entries it sends.
        offsets: of every entry that is sent: its place in its bin.
        signs: a bit for each of them, set where it is negative; the first is the highest of its byte.

    Raises:
        ValueError: arrays of other types or lengths, or a place outside its bin.
    """

    sizes: Int32[np.ndarray, " layers"]
    bins: Int32[np.ndarray, " layers"]
    scales: Float32[np.ndarray, " layers"]
    counts: UInt8[np.ndarray, " bins"] | UInt16[np.ndarray, " bins"]
    offsets: UInt8[np.ndarray, " k"] | UInt16[np.ndarray, " k"]
    signs: UInt8[np.ndarray, " bytes"]

    def __post_init__(self) -> None:
        _check_array("sizes", self.sizes, np.int32)
        _check_array("bins", self.bins, np.int32, len(self.sizes))
        _check_array("scales", self.scales, np.float32, len(self.sizes))
        if (self.sizes < 0).any() or (self.bins < 1).any():
            raise ValueError("sizes or bins: a layer cannot have less than no entry, nor a bin less than one")
        kind = place_type(int(self.bins.max(initial=1)))
        _check_array("counts", self.counts, kind, int(self._bins_of_layers.sum()))
        _check_array("offsets", self.offsets, kind, int(self.counts.sum(dtype=np.int64)))
        _check_array("signs", self.signs, np.uint8, -(-len(self.offsets) // 8))
        _, stops = self._edges
        if (self._indices >= np.repeat(stops, self.counts)).any():
            raise ValueError("offsets: a place outside its bin")

    @property
    def length(self) -> int:
        return int(self.sizes.sum(dtype=np.int64))

    def numbers(self) -> Tensor:
        return tensor(self.scales)

    def _add_to(self, out: Tensor, scale: float) -> None:
        layers = np.repeat(np.arange(len(self.sizes)), self._bins_of_layers)
        magnitudes = self.scales[np.repeat(layers, self.counts)]
        negative = np.unpackbits(self.signs, count=len(self.offsets)).astype(bool)
        _add_entries(out, self._indices, torch.from_numpy(np.where(negative, -magnitudes, magnitudes)), scale)

    def to_bytes(self) -> UInt8[np.ndarray, " bytes"]:
        """All but ``sizes`` and ``bins``, for a receiver who knows these."""
        arrays = (self.scales, self.counts, self.offsets, self.signs)
        return np.concatenate([a.view(np.uint8) for a in arrays])

    @classmethod
    def from_bytes(
        cls, data: UInt8[np.ndarray, " bytes"], sizes: Sequence[int], bins: Sequence[int]
    ) -> tuple[Signs, UInt8[np.ndarray, " rest"]]:
        """The message that ``data`` begins with, and what follows it.

        Raises:
            ValueError: that is none of these layers.
        """

        def take(kind: Any, count: int) -> np.ndarray:
            nonlocal data
            size = count * np.dtype(kind).itemsize
            piece, data = data[:size], data[size:]
            if len(piece) < size:
                raise ValueError(f"data ends {size - len(piece)} bytes too early for a message of these layers")
            return piece.copy().view(kind)

        kind = place_type(max(bins, default=1))
        scales = take(np.float32, len(sizes))
        counts = take(kind, sum(-(-size // bin) for size, bin in zip(sizes, bins, strict=True)))
        entries = int(counts.sum(dtype=np.int64))
        offsets, signs = take(kind, entries), take(np.uint8, -(-entries // 8))
        return cls(np.array(sizes, np.int32), np.array(bins, np.int32), scales, counts, offsets, signs), data

    @cached_property
    def _bins_of_layers(self) -> np.ndarray:
        return -(-self.sizes.astype(np.int64) // self.bins)

    @cached_property
    def _edges(self) -> tuple[np.ndarray, np.ndarray]:
        """Where every bin starts in the vector, and where it stops."""
        of_layer, ends = self._bins_of_layers, np.cumsum(self.sizes, dtype=np.int64)
        layer = np.repeat(np.arange(len(self.sizes)), of_layer)
        within = np.arange(len(layer)) - (np.cumsum(of_layer) - of_layer)[layer]
        starts = (ends - self.sizes)[layer] + within * self.bins[layer]
        return starts, np.minimum(starts + self.bins[layer], ends[layer])

    @cached_property
    def _indices(self) -> np.ndarray:
        return np.repeat(self._edges[0], self.counts) + self.offsets


@dataclass(frozen=True, eq=False)
class Halves(Message):
    """Every entry in 16 bits.

    Attributes:
        kind: ``float16`` or ``bfloat16``.
        bits: those of the entries. NumPy has no bfloat16.

    Raises:
        ValueError: another kind, or bits that are not 16.
    """

    kind: str
    bits: UInt16[np.ndarray, " n"]

    def __post_init__(self) -> None:
        if self.kind not in ("float16", "bfloat16"):
            raise ValueError(f"kind is {self.kind!r}: give float16 or bfloat16")
        _check_array("bits", self.bits, np.uint16)

    @property
    def length(self) -> int:
        return len(self.bits)

    def numbers(self) -> Tensor:
        return tensor(self.bits.view(np.int16)).view(getattr(torch, self.kind))

    def _add_to(self, out: Tensor, scale: float) -> None:
        out.add_(self.numbers().to(out.device, out.dtype), alpha=scale)


@dataclass(frozen=True, eq=False)
class Factors(Message):
    """Matrices P Q' by P and Q, and what is sent whole.

    Attributes:
        shapes: of every tensor: rows, columns, and the rank r; r = 0 for one that is sent whole.
        values: of every tensor, one after the other: P [rows, r] and Q [columns, r], or the entries themselves.

    Raises:
        ValueError: arrays of other types or lengths.
    """

    shapes: Int32[np.ndarray, "tensors 3"]
    values: Float32[np.ndarray, " values"]

    def __post_init__(self) -> None:
        _check_array("shapes", self.shapes, np.int32, None, 2)
        if self.shapes.shape[1] != 3 or (self.shapes < 0).any():
            raise ValueError("shapes: give rows, columns and rank of every tensor, none negative")
        _check_array("values", self.values, np.float32, sum(_numbers(*shape) for shape in self.shapes.tolist()))

    @property
    def length(self) -> int:
        return sum(rows * columns for rows, columns, _ in self.shapes.tolist())

    def numbers(self) -> Tensor:
        return tensor(self.values)

    def pairs(self) -> Iterator[tuple[tuple[int, int], tuple[Tensor, Tensor | None]]]:
        """Of every tensor rows and columns, and P and Q, or its entries and None."""
        shapes = self.shapes.tolist()
        pieces = self.numbers().split([_numbers(*shape) for shape in shapes])
        for (rows, columns, rank), piece in zip(shapes, pieces, strict=True):
            if rank:
                P, Q = piece.split([rows * rank, columns * rank])
                yield (rows, columns), (P.view(rows, rank), Q.view(columns, rank))
            else:
                yield (rows, columns), (piece.view(rows, columns), None)

    def _add_to(self, out: Tensor, scale: float) -> None:
        start = 0
        for (rows, columns), (P, Q) in self.pairs():
            place, P = out[start : start + rows * columns].view(rows, columns), P.to(out.device, out.dtype)
            start += rows * columns
            if Q is None:
                place.add_(P, alpha=scale)
            else:
                place.addmm_(P, Q.to(out.device, out.dtype).T, alpha=scale)


def tensor(array: np.ndarray) -> Tensor:
    """The same memory, or a copy where that must not be written, as of what comes out of a shared store."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def place_type(bin: int) -> Any:
    """Of counts and offsets within bins of so many entries."""
    return np.uint8 if bin <= SMALL else np.uint16


def _numbers(rows: int, columns: int, rank: int) -> int:
    return (rows + columns) * rank if rank else rows * columns


def _add_entries(out: Tensor, indices: np.ndarray, values: Tensor, scale: float) -> None:
    at = torch.from_numpy(indices.astype(np.int64)).to(out.device)
    out.index_add_(0, at, values.to(out.device, out.dtype), alpha=scale)


def _check_array(name: str, array: object, kind: Any, length: int | None = None, dimensions: int = 1) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != kind or array.ndim != dimensions:
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"{name} is {found}: give {dimensions} dimension(s) of {np.dtype(kind)}")
    if length is not None and len(array) != length:
        raise ValueError(f"{name} has {len(array)} entries: by the rest of the message they are {length}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} has gaps: give a contiguous array")
