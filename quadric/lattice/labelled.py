"""The graph that lattices are generated from: an automaton whose arcs know their words and phones."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Bool, Int32, Int64

from quadric.files import new_file
from quadric.lattice.arrays import check_types
from quadric.lattice.automaton import Automaton
from quadric.lattice.lattice import Lattice


@dataclass(frozen=True, eq=False)
class LabelledAutomaton:
    """An automaton with, for every arc, what it says and which phone it belongs to.

    ========= ========= ======= ======================================================================
    field     type      shape   meaning
    ========= ========= ======= ======================================================================
    automaton Automaton         states, arcs, weights; may be cyclic
    word      int32     [A]     label of a word: its index in the list of words + 1; 0: none
    phone     int32     [A]     phone the arc belongs to
    begins    bool      [A]     whether the arc is the first frame of its phone
    ========= ========= ======= ======================================================================

    The words of a path are the labels of its arcs in turn; a label need not be on the first frame of its word.
    Takes 29 bytes an arc. Raises ``ValueError`` when the arrays do not describe such an automaton.
    """

    automaton: Automaton
    word: Int32[np.ndarray, " A"]
    phone: Int32[np.ndarray, " A"]
    begins: Bool[np.ndarray, " A"]

    def __post_init__(self) -> None:
        check_types(self, {"word": np.int32, "phone": np.int32, "begins": np.bool_})
        for name in ("word", "phone", "begins"):
            if len(getattr(self, name)) != self.num_arcs:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries; the automaton has {self.num_arcs} arcs, each "
                    "needs one"
                )
        for name in ("word", "phone"):
            if self.num_arcs and getattr(self, name).min() < 0:
                raise ValueError(f"{name} must not be negative, found {getattr(self, name).min()}")

    @property
    def num_states(self) -> int:
        return self.automaton.num_states

    @property
    def num_arcs(self) -> int:
        return self.automaton.num_arcs

    @property
    def num_pdfs(self) -> int:
        """The fewest columns a matrix of scores may have: the largest pdf plus one."""
        return self.automaton.num_pdfs

    def lattice(
        self,
        arc: Int32[np.ndarray, " A"],
        source: Int32[np.ndarray, " A"],
        target: Int32[np.ndarray, " A"],
        frames: Int64[np.ndarray, " T+1"],
        last: Int32[np.ndarray, " F"],
    ) -> Lattice:
        """The lattice of arcs ``arc`` of this graph.

        Args:
            source, target: the states of the lattice that each of them leads from and to.
            frames: where the arcs of each frame begin.
            last: for every last state of the lattice, its state of the graph.
        """
        return Lattice(
            source=source,
            target=target,
            pdf=self.automaton.pdf[arc],
            weight=self.automaton.weight[arc].astype(np.float32),
            word=self.word[arc],
            phone=self.phone[arc],
            begins=self.begins[arc],
            frames=frames,
            final=self.automaton.final[last],
        )

    def save(self, path: Path) -> None:
        """Writes the graph as an npz file; the file appears whole or not at all."""
        arrays: dict[str, Any] = {name: getattr(self.automaton, name) for name in _AUTOMATON}
        with new_file(Path(path)) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays, word=self.word, phone=self.phone, begins=self.begins)

    @classmethod
    def load(cls, path: Path) -> LabelledAutomaton:
        """Reads what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds something else, or is damaged.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"path={str(path)!r}: there is no such file of a graph")
        try:
            with np.load(path, allow_pickle=False) as arrays:
                inner = {name: arrays[name] for name in _AUTOMATON}
                outer = {name: arrays[name] for name in ("word", "phone", "begins")}
            return cls(Automaton(**(inner | {"start": int(inner["start"])})), **outer)
        except (KeyError, ValueError, TypeError, EOFError, OSError, BadZipFile) as error:
            raise ValueError(f"path={str(path)!r} is not a file that LabelledAutomaton.save wrote: {error}") from error


_AUTOMATON = tuple(field.name for field in fields(Automaton))
