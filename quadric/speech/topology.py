"""The states of phones and the tying of their outputs.

Every phone, silence too, is a left-to-right hidden Markov model of :data:`STATES` emitting states with self
loops and without skips. A :class:`Tying` says which output of the network (pdf) a state of a phone in its
context emits from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Int32, Integer

from quadric.files import new_file
from quadric.speech.lexicon import SILENCE

STATES = 3


@dataclass(frozen=True, eq=False)
class Tying:
    """Which pdf each state of each phone in context emits from.

    ``phones[0]`` is silence, and a phone is known by its index. ``table[centre, left, right, state]`` is a
    pdf; without context (``context=1``) the table has shape ``[P, 1, 1, STATES]``, for triphones
    (``context=3``) shape ``[P, P, P, STATES]``. Beyond the ends of an utterance the context is silence. The
    pdfs are 0 to ``num_pdfs - 1``, all in use, each of one centre phone and one state. Raises ``ValueError``
    where this does not hold.

    >>> tying = monophone(("AH", "T"))
    >>> tying.num_pdfs, tying.pdfs((2,)), tying.phone_of_pdf.tolist()
    (9, (6, 7, 8), [0, 0, 0, 1, 1, 1, 2, 2, 2])
    """

    phones: tuple[str, ...]
    context: Literal[1, 3]
    table: Int32[np.ndarray, " P L R S"]

    def __post_init__(self) -> None:
        if not self.phones or self.phones[0] != SILENCE:
            raise ValueError(f"phones must begin with {SILENCE}, not with {self.phones[:1]}")
        if len(set(self.phones)) != len(self.phones):
            repeated = sorted({phone for phone in self.phones if self.phones.count(phone) > 1})
            raise ValueError(f"phones holds {', '.join(repeated)} more than once: name each phone once")
        if self.context not in (1, 3):
            raise ValueError(f"context={self.context} must be 1 (monophones) or 3 (triphones)")
        count = len(self.phones)
        width = 1 if self.context == 1 else count
        if self.table.shape != (count, width, width, STATES):
            raise ValueError(
                f"table has shape {self.table.shape}; with {count} phones and context={self.context} it must "
                f"be {(count, width, width, STATES)}: [centre, left, right, state]"
            )
        if not np.issubdtype(self.table.dtype, np.integer):
            raise ValueError(f"table must hold integers, not {self.table.dtype}")
        table = self.table.astype(np.int32)
        table.setflags(write=False)
        object.__setattr__(self, "table", table)
        self._check_pdfs()

    def _check_pdfs(self) -> None:
        pdfs = np.unique(self.table)
        if not np.array_equal(pdfs, np.arange(len(pdfs))):
            raise ValueError(
                f"table must use every pdf from 0 to the largest; it holds {len(pdfs)} pdfs between "
                f"{pdfs[0]} and {pdfs[-1]}: renumber them"
            )
        owners = np.concatenate(
            [np.unique(self.table[p, ..., s]) for p in range(len(self.phones)) for s in range(STATES)]
        )
        if len(owners) != len(pdfs):
            shared = np.flatnonzero(np.bincount(owners) > 1)
            raise ValueError(
                f"table shares pdf {shared[0]} between two phones or states: a pdf belongs to one centre phone "
                "and one state"
            )

    @property
    def num_pdfs(self) -> int:
        return int(self.table.max()) + 1

    def pdfs(self, window: Sequence[int]) -> tuple[int, ...]:
        """The pdfs of the states of a phone: ``window`` is ``(phone,)``, or ``(left, phone, right)``."""
        if len(window) != self.context or not all(0 <= phone < len(self.phones) for phone in window):
            raise ValueError(
                f"window={tuple(window)} must hold {self.context} of the phones 0 to {len(self.phones) - 1}"
            )
        left, centre, right = (0, window[0], 0) if self.context == 1 else window
        return tuple(self.table[centre, left, right].tolist())

    @cached_property
    def phone_of_pdf(self) -> Int32[np.ndarray, " C"]:
        """The centre phone of every pdf."""
        return self._owner(axis=0)

    @cached_property
    def state_of_pdf(self) -> Int32[np.ndarray, " C"]:
        """The state, 0 to ``STATES - 1``, of every pdf."""
        return self._owner(axis=3)

    def _owner(self, axis: int) -> Int32[np.ndarray, " C"]:
        owner = np.empty(self.num_pdfs, np.int32)
        owner[self.table] = np.indices(self.table.shape, np.int32, sparse=True)[axis]
        owner.setflags(write=False)
        return owner

    def save(self, path: Path) -> None:
        """Writes the tying as an npz file; the file appears whole or not at all."""
        with new_file(Path(path)) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, phones=np.array(self.phones), context=np.array(self.context), table=self.table)

    @classmethod
    def load(cls, path: Path) -> Tying:
        """Reads what :meth:`save` wrote."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"path={str(path)!r}: there is no such file of a tying")
        try:
            with np.load(path, allow_pickle=False) as arrays:
                phones, context, table = arrays["phones"], arrays["context"], arrays["table"]
        except (KeyError, ValueError, EOFError, OSError, BadZipFile) as error:
            raise ValueError(f"path={str(path)!r} is not a file that Tying.save wrote: {error}") from error
        return cls(tuple(phones.tolist()), int(context), table)  # type: ignore[arg-type]


def monophone(phones: Sequence[str]) -> Tying:
    """The tying without context: state ``s`` of phone ``p`` is pdf ``STATES * p + s``.

    ``phones`` are those of the lexicon; silence is put in front.
    """
    named = (SILENCE, *(phone for phone in phones if phone != SILENCE))
    table = np.arange(len(named) * STATES, dtype=np.int32).reshape(len(named), 1, 1, STATES)
    return Tying(named, 1, table)


class Segment(NamedTuple):
    """A phone from frame ``start`` up to, without, frame ``end``; ``phone`` indexes ``Tying.phones``."""

    phone: int
    start: int
    end: int


def phone_segments(pdfs: Integer[np.ndarray, " T"], tying: Tying) -> list[Segment]:
    """The phones of an alignment: a new one begins where the phone changes or its state goes back.

    >>> phone_segments(np.array([0, 1, 2, 2, 3, 4, 5, 3, 4, 5]), monophone(("AH",)))
    [Segment(phone=0, start=0, end=4), Segment(phone=1, start=4, end=7), Segment(phone=1, start=7, end=10)]
    """
    pdfs = np.asarray(pdfs)
    if pdfs.ndim != 1 or not np.issubdtype(pdfs.dtype, np.integer):
        raise ValueError(f"pdfs must be one row of integers, not {pdfs.dtype} of shape {pdfs.shape}")
    if not len(pdfs):
        return []
    if pdfs.min() < 0 or pdfs.max() >= tying.num_pdfs:
        raise ValueError(
            f"pdfs holds values from {pdfs.min()} to {pdfs.max()}; the tying has pdfs 0 to {tying.num_pdfs - 1}"
        )
    phone, state = tying.phone_of_pdf[pdfs], tying.state_of_pdf[pdfs]
    begins = np.flatnonzero((phone[1:] != phone[:-1]) | (state[1:] < state[:-1])) + 1
    edges = [0, *begins.tolist(), len(pdfs)]
    return [Segment(int(phone[start]), start, end) for start, end in pairwise(edges)]
