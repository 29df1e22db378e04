"""A lattice as few bytes: what repeats from frame to frame is written once."""

from __future__ import annotations

import zlib
from io import BytesIO

import numba
import numpy as np

from quadric.lattice.lattice import Lattice

_LEVEL = 3  # zlib's: higher ones take longer than the search and save little
_KIND = ("pdf", "phone", "word", "weight", "begins")


def encode(lattice: Lattice) -> bytes:
    """The lattice, compressed without loss; one or two bytes an arc are usual.

    An arc is a step to the next source, or none (one bit), its target counted from the first state of the next time,
    and one of the kinds of arcs of this lattice, each written once: a state that lasts emits the same again and again.
    """
    begins = lattice.begins.astype(np.int32)
    rows = np.stack([lattice.pdf, lattice.phone, lattice.word, lattice.weight.view(np.int32), begins], axis=1)
    kind, first = _kinds(rows)
    parts = [
        np.array([lattice.num_arcs]),
        np.diff(lattice.levels),
        np.packbits(np.diff(lattice.source, prepend=0) > 0),
        lattice.target - lattice.levels[lattice.frame + 1],
        kind,
        *(getattr(lattice, name)[first] for name in _KIND),
        lattice.final,
    ]
    content = BytesIO()
    for part in parts:
        np.save(content, _narrow(part), allow_pickle=False)
    return zlib.compress(content.getbuffer(), _LEVEL)


def decode(content: bytes) -> Lattice:
    """What :func:`encode` wrote. Raises ``ValueError`` if it is something else."""
    try:
        file = BytesIO(zlib.decompress(content))
        (num_arcs,), sizes, steps, target, kind, *kinds, final = (
            np.load(file, allow_pickle=False) for _ in range(6 + len(_KIND))
        )
        source = np.cumsum(np.unpackbits(steps, count=num_arcs), dtype=np.int32)
        levels = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        frames = np.searchsorted(source, levels[:-1])
        frame = np.repeat(np.arange(len(frames) - 1), np.diff(frames))
        pdf, phone, word, weight, begins = (values[kind] for values in kinds)
        return Lattice(
            source=source,
            target=(levels[frame + 1] + target).astype(np.int32),
            pdf=pdf.astype(np.int32),
            weight=weight,
            word=word.astype(np.int32),
            phone=phone.astype(np.int32),
            begins=begins,
            frames=frames.astype(np.int64),
            final=final,
        )
    except (zlib.error, EOFError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"the bytes are not those of a lattice: {error}") from error


def _narrow(values: np.ndarray) -> np.ndarray:
    """Whole numbers, none of them negative, in as few bytes as they need; others as they are."""
    if not np.issubdtype(values.dtype, np.signedinteger):
        return values
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))


@numba.njit(nogil=True, cache=True)
def _equal(rows, a, b):  # type: ignore[no-untyped-def]  # pragma: no cover
    same = True
    for k in range(rows.shape[1]):
        same = same and rows[a, k] == rows[b, k]
    return same


@numba.njit(nogil=True, cache=True)
def _kinds(rows):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Numbers equal rows alike, in the order they appear; and where each number appears first."""
    size = 1
    while size < 2 * len(rows):
        size *= 2
    table, kind = np.full(size, -1, np.int32), np.empty(len(rows), np.int32)
    first, found = np.empty(len(rows), np.int64), 0
    for a in range(len(rows)):
        key = np.uint64(0)
        for x in rows[a]:
            key = (key ^ np.uint64(x)) * np.uint64(0x9E3779B97F4A7C15)
            key ^= key >> np.uint64(29)
        place = np.int64(key & np.uint64(size - 1))
        while table[place] >= 0 and not _equal(rows, first[table[place]], a):
            place = (place + 1) & (size - 1)
        if table[place] < 0:
            table[place], first[found] = found, a
            found += 1
        kind[a] = table[place]
    return kind, first[:found]
