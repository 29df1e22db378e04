"""Kaldi's transition model: what the transition-ids of its lattices and alignments stand for.

A *transition-state* is a state of a phone's hidden Markov model together with its pdf, and a *transition-id* one of
the transitions that leave it. Transition-states count from 1 in the order of the model, transition-ids count from 1
through the transitions of all transition-states, each in the order of its topology. Format: Kaldi,
``src/hmm/transition-model.h`` and ``src/hmm/hmm-topology.h``.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Float32, Int32

from quadric.files import new_file
from quadric.speech.tables import few
from quadric.speech.topology import STATES, Tying

T = TypeVar("T")

NO_PDF = -1


class HmmState(NamedTuple):
    """A state of a topology: its pdf classes (``NO_PDF``: emits nothing) and its transitions ``(state, probability)``.

    Chain models emit another class on the self loop than on the other transitions; all others have two equal classes.
    """

    pdf_class: int
    self_loop_pdf_class: int
    transitions: tuple[tuple[int, float], ...]


class Topology(NamedTuple):
    """The states of some phones. A phone is entered in state 0; the last state is its end and has no transitions."""

    phones: tuple[int, ...]
    states: tuple[HmmState, ...]


@dataclass(frozen=True, eq=False)
class TransitionModel:
    """The transitions of a model, numbered as Kaldi does.

    ``states[i]`` is transition-state ``i + 1``: phone (Kaldi's number, from 1), state in the phone, pdf, and pdf of
    the self loop. ``log_probs[i]`` belongs to transition-id i; entry 0 is not used. Raises ``ValueError`` where they
    do not fit together.

    >>> from quadric.speech.topology import monophone
    >>> model = TransitionModel.of(monophone(("AH",)))
    >>> model.num_ids, model.pdf[1:7].tolist(), model.self_loop[1:4].tolist(), model.ends[4:7].tolist()
    (12, [0, 0, 1, 1, 2, 2], [True, False, True], [False, False, True])
    """

    topologies: tuple[Topology, ...]
    states: Int32[np.ndarray, " N 4"]
    log_probs: Float32[np.ndarray, " I+1"]

    def __post_init__(self) -> None:
        owners: dict[int, Topology] = {}
        for topology in self.topologies:
            _check_topology(topology)
            for phone in topology.phones:
                if owners.setdefault(phone, topology) is not topology or phone < 1:
                    raise ValueError(f"topologies: phone {phone} must be at least 1 and have one topology")
        if self.states.ndim != 2 or self.states.shape[1] != 4 or self.states.dtype != np.int32 or not len(self.states):
            raise ValueError(
                f"states must hold rows of phone, state, pdf and pdf of the self loop in int32, not "
                f"{self.states.dtype} of shape {self.states.shape}"
            )
        for phone, state, pdf, loop_pdf in self.states.tolist():
            if phone not in owners:
                raise ValueError(f"states: phone {phone} has no topology: the model is damaged")
            topology = owners[phone]
            if not 0 <= state < len(topology.states) or topology.states[state].pdf_class == NO_PDF:
                raise ValueError(f"states: phone {phone} has no emitting state {state}: the model is damaged")
            if min(pdf, loop_pdf) < 0:
                raise ValueError(f"states: phone {phone}, state {state} has the pdf {min(pdf, loop_pdf)}: below 0")
        if self.log_probs.shape != (self.num_ids + 1,) or not np.all(np.isfinite(self.log_probs)):
            raise ValueError(
                f"log_probs must hold a finite number for each of the {self.num_ids} transition-ids and one in front, "
                f"not shape {self.log_probs.shape}"
            )

    @cached_property
    def _transitions(self) -> list[tuple[tuple[int, float], ...]]:
        """The transitions of each transition-state."""
        owners = {phone: topology for topology in self.topologies for phone in topology.phones}
        return [owners[phone].states[state].transitions for phone, state, _, _ in self.states.tolist()]

    @cached_property
    def num_ids(self) -> int:
        return sum(map(len, self._transitions))

    @property
    def num_pdfs(self) -> int:
        """The largest pdf plus one."""
        return int(self.states[:, 2:].max()) + 1

    @cached_property
    def state(self) -> Int32[np.ndarray, " I+1"]:
        """The transition-state of every transition-id, from 1; 0 for transition-id 0, which is epsilon."""
        counts = [1, *map(len, self._transitions)]
        return _frozen(np.repeat(np.arange(len(counts), dtype=np.int32), counts))

    @cached_property
    def target(self) -> Int32[np.ndarray, " I+1"]:
        """The state of the phone that every transition-id leads to."""
        return _frozen(np.array([NO_PDF, *(to for row in self._transitions for to, _ in row)], np.int32))

    @cached_property
    def phone(self) -> Int32[np.ndarray, " I+1"]:
        """The phone, Kaldi's number, of every transition-id."""
        return self._of_state(0)

    @cached_property
    def hmm_state(self) -> Int32[np.ndarray, " I+1"]:
        """The state of the phone that every transition-id leaves."""
        return self._of_state(1)

    @cached_property
    def pdf(self) -> Int32[np.ndarray, " I+1"]:
        """The pdf of every transition-id."""
        return _frozen(np.where(self.self_loop, self._of_state(3), self._of_state(2)).astype(np.int32))

    @cached_property
    def self_loop(self) -> Bool[np.ndarray, " I+1"]:
        """Whether a transition-id leads back to the state it leaves."""
        loops = self.target == self.hmm_state
        loops[0] = False
        return _frozen(loops)

    @cached_property
    def ends(self) -> Bool[np.ndarray, " I+1"]:
        """Whether a transition-id leads to the end of its phone."""
        sizes = {phone: len(topology.states) for topology in self.topologies for phone in topology.phones}
        last = np.array([0, *(sizes[phone] - 1 for phone in self.states[:, 0].tolist())], np.int32)
        return _frozen(self.target == last[self.state])

    def _of_state(self, column: int) -> np.ndarray:
        values = np.concatenate([np.full(1, NO_PDF, np.int32), self.states[:, column]])
        return _frozen(values[self.state])

    def check_pdfs(self, num_pdfs: int) -> None:
        """Raises ``ValueError`` where the transition model uses pdfs beyond the ``num_pdfs`` of a model."""
        if self.num_pdfs > num_pdfs:
            raise ValueError(
                f"num_pdfs={num_pdfs}: the transition model uses pdf {self.num_pdfs - 1}: it belongs to another model"
            )

    @classmethod
    def of(cls, tying: Tying, *, self_loop: float = 0.5) -> TransitionModel:
        """The transition model of one of our own systems; ``self_loop`` is the probability to stay.

        Phone p of ``tying.phones`` is Kaldi's phone p + 1, silence is phone 1, as in the graphs. Transition-states
        are the triples of phone, state and pdf in ascending order; of transition-state i the self loop is
        transition-id 2 i - 1 and the step onward transition-id 2 i.
        """
        if not 0.0 < self_loop < 1.0:
            raise ValueError(f"self_loop={self_loop} must be a probability between 0 and 1")
        states = [HmmState(state, state, ((state, self_loop), (state + 1, 1.0 - self_loop))) for state in range(STATES)]
        topology = Topology(tuple(range(1, len(tying.phones) + 1)), (*states, HmmState(NO_PDF, NO_PDF, ())))
        triples = sorted((tying.phone_of_pdf[c] + 1, tying.state_of_pdf[c], c, c) for c in range(tying.num_pdfs))
        log_probs = [0.0, *[math.log(self_loop), math.log(1.0 - self_loop)] * len(triples)]
        return cls((topology,), np.array(triples, np.int32), np.array(log_probs, np.float32))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it in Kaldi's text form, with no acoustic model behind; the file appears whole or not at all."""
        with new_file(Path(path)) as temporary:
            temporary.write_text("".join(_text(self)), encoding="ascii")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TransitionModel:
        """Reads a file that begins with a transition model, such as Kaldi's ``final.mdl`` or ``0.trans_mdl``.

        Text and binary files are told apart by themselves; what follows the transition model is not read.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it does not begin with a transition model, or with a damaged one.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"path={str(path)!r}: there is no such file of a transition model")
        with path.open("rb") as file:
            binary = file.peek(2)[:2] == b"\0B"
            reader = _Binary(file) if binary else _Text(file)
            try:
                return _read(reader)
            except (ValueError, struct.error) as error:
                kind = "binary" if binary else "text"
                raise ValueError(
                    f"path={str(path)!r} does not begin with a transition model in Kaldi's {kind} form: {error}"
                ) from None


def _frozen(values: np.ndarray) -> np.ndarray:
    values.setflags(write=False)
    return values


def _check_topology(topology: Topology) -> None:
    count = len(topology.states)
    if count < 2 or topology.states[-1].transitions or topology.states[-1].pdf_class != NO_PDF:
        raise ValueError(
            f"topologies: the last state of phones {few(list(map(str, topology.phones)))} must be an end without pdf "
            "and transitions, behind at least one other state"
        )
    outside = [to for state in topology.states for to, _ in state.transitions if not 0 <= to < count]
    if outside:
        raise ValueError(f"topologies: a transition leads to state {outside[0]} of {count} states")


# ------------------------------------------------------------------------------------------------ reading, writing


class _Text:
    """Kaldi's values as words between blanks."""

    def __init__(self, file: BinaryIO) -> None:
        self._words: Iterator[str] = (word.decode("ascii", "replace") for line in file for word in line.split())

    def token(self) -> str:
        try:
            return next(self._words)
        except StopIteration:
            raise ValueError("the file ends within it") from None

    def integer(self) -> int:
        return self._number(int)

    def vector(self) -> list[float]:
        self.expect("[")
        values = []
        while (word := self.token()) != "]":
            values.append(float(word))
        return values

    def topologies(self) -> Iterator[Topology]:
        while (token := self.token()) != "</Topology>":
            _expected("<TopologyEntry>", token)
            self.expect("<ForPhones>")
            phones = []
            while (token := self.token()) != "</ForPhones>":
                phones.append(int(token))
            states: list[HmmState] = []
            while (token := self.token()) != "</TopologyEntry>":
                _expected("<State>", token)
                if self.integer() != len(states):
                    raise ValueError(f"state {len(states)} of a topology is missing")
                states.append(self._state())
            yield Topology(tuple(phones), tuple(states))

    def _state(self) -> HmmState:
        token, forward, loop = self.token(), NO_PDF, NO_PDF
        if token == "<PdfClass>":
            forward = loop = self.integer()
            token = self.token()
        elif token == "<ForwardPdfClass>":
            forward = self.integer()
            self.expect("<SelfLoopPdfClass>")
            loop, token = self.integer(), self.token()
        transitions = []
        while token == "<Transition>":
            transitions.append((self.integer(), self._number(float)))
            token = self.token()
        _expected("</State>", token)
        return HmmState(forward, loop, tuple(transitions))

    def expect(self, token: str) -> None:
        _expected(token, self.token())

    def _number(self, kind: Callable[[str], T]) -> T:
        return kind(self.token())


class _Binary:
    """Kaldi's values in bytes: a number is led by its size, a token ends with a blank."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size = file, os.fstat(file.fileno()).st_size
        self._take(2)

    def _take(self, size: int) -> bytes:
        if not 0 <= size <= self._size - self._file.tell():
            raise ValueError(f"the file ends within it, at byte {self._size}")
        return self._file.read(size)

    def token(self) -> str:
        letters = b""
        while not letters.endswith(b" "):
            if len(letters) > 40:
                raise ValueError(f"no word at byte {self._file.tell() - len(letters)}")
            letters += self._take(1)
        return letters[:-1].decode("ascii", "replace")

    def integer(self) -> int:
        return int(self._number("<i"))

    def vector(self) -> list[float]:
        kind = self.token()
        if kind not in ("FV", "DV"):
            raise ValueError(f"a vector expected, not {kind!r}")
        count = self.integer()
        return np.frombuffer(self._take((4 if kind == "FV" else 8) * count), "<f4" if kind == "FV" else "<f8").tolist()

    def topologies(self) -> Iterator[Topology]:
        self._integers()
        owner = self._integers()
        count, chain = self.integer(), False
        if count == -1:
            chain, count = True, self.integer()
        for index in range(count):
            states: list[HmmState] = []
            for _ in range(self.integer()):
                forward = self.integer()
                loop = self.integer() if chain else forward
                transitions = tuple((self.integer(), float(self._number("<f"))) for _ in range(self.integer()))
                states.append(HmmState(forward, loop, transitions))
            yield Topology(tuple(phone for phone, own in enumerate(owner) if own == index), tuple(states))
        self.expect("</Topology>")

    def expect(self, token: str) -> None:
        _expected(token, self.token())

    def _number(self, form: str) -> float:
        size = self._take(1)[0]
        if size != struct.calcsize(form) and not (form == "<f" and size == 8):
            raise ValueError(f"a number of {struct.calcsize(form)} bytes expected before byte {self._file.tell()}")
        return struct.unpack("<d" if size == 8 else form, self._take(size))[0]

    def _integers(self) -> list[int]:
        if self._take(1)[0] != 4:
            raise ValueError(f"a vector of 4-byte integers expected before byte {self._file.tell()}")
        (count,) = struct.unpack("<i", self._take(4))
        return np.frombuffer(self._take(4 * count), "<i4").tolist()


def _expected(token: str, found: str) -> None:
    if found != token:
        raise ValueError(f"{token} expected, not {found!r}")


def _read(reader: _Text | _Binary) -> TransitionModel:
    reader.expect("<TransitionModel>")
    reader.expect("<Topology>")
    topologies = tuple(reader.topologies())
    kind = reader.token()
    if kind not in ("<Triples>", "<Tuples>"):
        raise ValueError(f"<Triples> or <Tuples> expected, not {kind!r}")
    states: list[tuple[int, int, int, int]] = []
    for _ in range(reader.integer()):
        phone, state, pdf = reader.integer(), reader.integer(), reader.integer()
        states.append((phone, state, pdf, reader.integer() if kind == "<Tuples>" else pdf))
    reader.expect(f"</{kind[1:]}")
    reader.expect("<LogProbs>")
    log_probs = reader.vector()
    reader.expect("</LogProbs>")
    reader.expect("</TransitionModel>")
    return TransitionModel(topologies, np.array(states, np.int32).reshape(-1, 4), np.array(log_probs, np.float32))


def _text(model: TransitionModel) -> Iterator[str]:
    """The pieces of Kaldi's text form."""
    chain = any(state.pdf_class != state.self_loop_pdf_class for row in model.topologies for state in row.states)
    yield "<TransitionModel> \n<Topology> \n"
    for topology in model.topologies:
        yield f"<TopologyEntry> \n<ForPhones> \n{' '.join(map(str, topology.phones))} \n</ForPhones> \n"
        for index, state in enumerate(topology.states):
            yield f"<State> {index} "
            if state.pdf_class != NO_PDF and chain:
                yield f"<ForwardPdfClass> {state.pdf_class} <SelfLoopPdfClass> {state.self_loop_pdf_class} "
            elif state.pdf_class != NO_PDF:
                yield f"<PdfClass> {state.pdf_class} "
            yield from (f"<Transition> {to} {probability:.6g} " for to, probability in state.transitions)
            yield "</State> \n"
        yield "</TopologyEntry> \n"
    kind = "Tuples" if chain else "Triples"
    yield f"</Topology> \n<{kind}> {len(model.states)} \n"
    for row in model.states.tolist():
        yield " ".join(map(str, row if chain else row[:3])) + " \n"
    yield f"</{kind}> \n<LogProbs> \n [ {' '.join(f'{value:.6g}' for value in model.log_probs.tolist())} ]\n"
    yield "</LogProbs> \n</TransitionModel> \n"
