"""The two forms of one lattice in Kaldi's archives, bytes and text, each plain or compact.

Formats: Kaldi, ``src/lat/kaldi-lattice.cc`` and ``src/fstext/lattice-weight.h``; in bytes it is OpenFst's vector
automaton of arcs "lattice4" or "compactlattice44".
"""

from __future__ import annotations

import struct

import numba
import numpy as np

from quadric.speech.kaldi_lattice import StringLattice
from quadric.speech.kaldi_stream import Ends, Stream

MAGIC = struct.pack("<i", 2125659606)  # in front of every automaton of OpenFst
_HEADER = struct.Struct("<iiQqqq")  # version, flags, properties, start, states, arcs
_PROPERTIES = 3  # its arcs are in memory and may change; of all others nothing is claimed
_KINDS = {"lattice4": (False, 4), "lattice8": (False, 8), "compactlattice44": (True, 4), "compactlattice84": (True, 8)}


def read_binary(stream: Stream) -> StringLattice:
    """The lattice in bytes at the place of ``stream``. Raises ``Ends``, or ``ValueError`` with what is wrong."""
    compact, size, start, states = _read_header(stream)
    cost = size // 2  # 4-byte words of both costs
    while True:
        available = (len(stream.buffer) - stream.at) // 4
        words = np.frombuffer(stream.buffer, np.int32, available, stream.at).copy()
        used, arcs, source, finals = _scan(words, states, cost, compact)
        if used >= 0:
            break
        if used == -2:
            raise ValueError("a number of arcs or of transition-ids is below 0")
        if not stream.more():
            raise Ends
    stream.at += 4 * used

    def costs(at: np.ndarray) -> np.ndarray:
        if size == 4:
            pairs = np.stack([words.view(np.float32)[at], words.view(np.float32)[at + 1]], 1)
            with np.errstate(invalid="ignore"):  # damage may look like a signalling NaN
                return pairs.astype(np.float64)
        return np.ascontiguousarray(words[at[:, None] + np.arange(4)]).view(np.float64)

    def strings(at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        length = words[at].astype(np.int64)
        inner = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
        return length, words[np.repeat(at + 1, length) + inner]

    final_costs = costs(finals)
    ending = ~np.all(np.isposinf(final_costs), axis=1)
    finals, final_costs = finals[ending], final_costs[ending]
    if compact:
        length, string = strings(arcs + 2 + cost)
        final_length, final_string = strings(finals + cost)
    else:
        string = words[arcs]
        length, string = (string > 0).astype(np.int64), string[string > 0]
        final_length, final_string = np.zeros(len(finals), np.int64), np.zeros(0, np.int64)
        if np.any(words[arcs] < 0):
            raise ValueError(f"it has the transition-id {words[arcs].min()}")
    return StringLattice(
        source=source,
        target=words[arcs + 2 + cost + (1 + length if compact else 0)],
        word=words[arcs if compact else arcs + 1],
        costs=costs(arcs + 2),
        length=length,
        strings=string,
        final=np.flatnonzero(ending),
        final_costs=final_costs,
        final_length=final_length,
        final_strings=final_string,
        num_states=states,
        start=start,
    )


def _read_header(stream: Stream) -> tuple[bool, int, int, int]:
    """Whether the lattice is compact, the bytes of a cost, the start and the number of states."""

    def take(count: int) -> bytes:
        if not stream.need(count):
            raise Ends
        stream.at += count
        return stream.buffer[stream.at - count : stream.at]

    def string() -> str:
        (length,) = struct.unpack("<i", take(4))
        if not 0 <= length < 100:
            raise ValueError("OpenFst's header is broken")
        return take(length).decode("ascii", "replace")

    if take(4) != MAGIC:
        raise ValueError("OpenFst's number is not in front of it")
    form, kind = string(), string()
    if form != "vector" or kind not in _KINDS:
        raise ValueError(
            f"it is an automaton {form!r} of {kind!r}, no lattice: lattices are 'vector' of one of {', '.join(_KINDS)}"
        )
    version, flags, _, start, states, _ = _HEADER.unpack(take(_HEADER.size))
    if version != 2 or flags != 0 or states < 0 or start >= max(states, 1):
        raise ValueError(f"OpenFst's version {version}, flags {flags} or {states} states: write it with lattice-copy")
    if states == 0:
        raise ValueError("it has no states: leave it out")
    return *_KINDS[kind], start, states


@numba.njit(nogil=True, cache=True)
def _scan(words, num_states, cost, compact):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Where the arcs and the finals are in ``words``, the sources of the arcs, and how many words there are.

    The number is -1 where ``words`` end before the lattice does, -2 where a length is negative.
    """
    size = len(words)
    arcs = np.empty(size // (3 + cost) + 1, np.int64)
    source = np.empty(len(arcs), np.int32)
    finals = np.empty(min(num_states, size) + 1, np.int64)
    at, count = 0, 0
    for state in range(num_states):
        if at + cost + (3 if compact else 2) > size:
            return -1, arcs[:0], source[:0], finals[:0]
        finals[state] = at
        at += cost
        if compact:
            if words[at] < 0:
                return -2, arcs[:0], source[:0], finals[:0]
            at += 1 + words[at]
            if at + 2 > size:
                return -1, arcs[:0], source[:0], finals[:0]
        leaving = words[at]
        if leaving < 0 or words[at + 1] != 0:
            return -2, arcs[:0], source[:0], finals[:0]
        at += 2
        for _ in range(leaving):
            if at + cost + (4 if compact else 3) > size:
                return -1, arcs[:0], source[:0], finals[:0]
            arcs[count], source[count] = at, state
            count += 1
            at += 2 + cost
            if compact:
                if words[at] < 0:
                    return -2, arcs[:0], source[:0], finals[:0]
                at += 1 + words[at]
                if at >= size:
                    return -1, arcs[:0], source[:0], finals[:0]
            at += 1
    return at, arcs[:count], source[:count], finals[:num_states]


def read_text(stream: Stream) -> StringLattice:
    """The lattice in lines at the place of ``stream``. Raises ``Ends``, or ``ValueError`` with what is wrong."""
    lines = []
    while True:
        line = stream.line()
        if line is None:
            raise Ends
        if not line.strip():
            break
        lines.append(line.decode("ascii", "replace").split())
    if not lines:
        raise ValueError("it is empty: leave it out")
    compact = _is_compact(lines)
    arcs, finals = list[tuple[int, int, int, float, float, list[int]]](), list[tuple[int, float, float, list[int]]]()
    for number, parts in enumerate(lines, 1):
        try:
            if len(parts) > 2:
                arcs.append(_arc(parts, compact))
            else:
                finals.append((_integer(parts[0]), *_weight(parts[1:], compact)))
        except ValueError:
            raise ValueError(
                f"line {number} behind its id, {' '.join(parts)!r}, is neither an arc nor a final state; labels "
                "must be integers"
            ) from None
    finals = [final for final in finals if final[1:3] != (np.inf, np.inf)]
    return StringLattice(
        source=np.array([arc[0] for arc in arcs], np.int64),
        target=np.array([arc[1] for arc in arcs], np.int64),
        word=np.array([arc[2] for arc in arcs], np.int64),
        costs=np.array([arc[3:5] for arc in arcs], np.float64).reshape(-1, 2),
        length=np.array([len(arc[5]) for arc in arcs], np.int64),
        strings=np.array([id for arc in arcs for id in arc[5]], np.int64),
        final=np.array([final[0] for final in finals], np.int64),
        final_costs=np.array([final[1:3] for final in finals], np.float64).reshape(-1, 2),
        final_length=np.array([len(final[3]) for final in finals], np.int64),
        final_strings=np.array([id for final in finals for id in final[3]], np.int64),
        num_states=max([int(lines[0][0]), *(max(arc[:2]) for arc in arcs), *(final[0] for final in finals)]) + 1,
        start=int(lines[0][0]),
    )


def _is_compact(lines: list[list[str]]) -> bool:
    """Told by the number of columns and, in weights, of commas."""
    for parts in lines:
        commas = parts[-1].count(",")
        if len(parts) == 3 or (len(parts) in (2, 4) and commas == 2):
            return True
        if len(parts) == 5 or (len(parts) in (2, 4) and commas < 2):
            return False
    return True


def _arc(parts: list[str], compact: bool) -> tuple[int, int, int, float, float, list[int]]:
    """Source, target, word, costs and transition-ids; a plain arc has its transition-id in front of its word."""
    count = 3 if compact else 4
    source, target, *labels = map(_integer, parts[:count])
    if len(labels) != count - 2 or len(parts) > count + 1:
        raise ValueError(parts)
    graph, acoustic, string = _weight(parts[count:], compact)
    return source, target, labels[-1], graph, acoustic, string if compact else [id for id in labels[:1] if id]


def _weight(text: list[str], compact: bool) -> tuple[float, float, list[int]]:
    """Costs and transition-ids of ``graph,acoustic`` or ``graph,acoustic,1_2_3``; nothing stands for no cost."""
    if not text:
        return 0.0, 0.0, []
    parts = text[0].split(",")
    if len(parts) != (3 if compact else 2):
        raise ValueError(text)
    ids = list(map(_integer, parts[2].split("_"))) if compact and parts[2] else []
    return float(parts[0]), float(parts[1]), ids


def _integer(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(text)
    return int(text)


def to_binary(given: StringLattice, compact: bool) -> bytes:
    """A lattice behind its id, in bytes; where it is not ``compact``, every arc has one transition-id."""
    kind = b"compactlattice44" if compact else b"lattice4"
    header = _HEADER.pack(2, 0, _PROPERTIES, given.start, given.num_states, len(given.source))
    order = np.argsort(given.source, kind="stable")
    begins = np.searchsorted(given.source[order], np.arange(given.num_states + 1))
    length = given.length[order] if compact else np.zeros(len(order), np.int64)
    head, size = (5, 6 + length) if compact else (4, 5 + length)  # 4-byte words of a state and of its arcs
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(size)])
    states = before[begins[:-1]] + head * np.arange(given.num_states)
    arcs = before[:-1] + head * (given.source[order] + 1)
    words = np.zeros(before[-1] + head * given.num_states, np.int32)
    reals = words.view(np.float32)
    reals[states], reals[states + 1] = np.inf, np.inf
    reals[states[given.final]], reals[states[given.final] + 1] = given.final_costs.T
    words[states + head - 2] = np.diff(begins)
    words[arcs] = given.word[order] if compact else given.strings[order]
    words[arcs + 1] = given.word[order]
    reals[arcs + 2], reals[arcs + 3] = given.costs[order].T
    words[arcs + size - 1] = given.target[order]
    if compact:
        words[arcs + 4] = length
        inner = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
        begin = (np.cumsum(given.length) - given.length)[order]
        words[np.repeat(arcs + 5, length) + inner] = given.strings[np.repeat(begin, length) + inner]
    return MAGIC + struct.pack("<i6si", 6, b"vector", len(kind)) + kind + header + words.tobytes()


def to_text(given: StringLattice, compact: bool) -> bytes:
    """A lattice behind its id, in lines; where it is not ``compact``, every arc has one transition-id."""
    order = np.argsort(given.source, kind="stable")
    begins = np.searchsorted(given.source[order], np.arange(given.num_states + 1))
    strings = np.split(given.strings, np.cumsum(given.length)[:-1]) if len(given.length) else []
    finals = {state: index for index, state in enumerate(given.final.tolist())}
    lines = [""]
    for state in [given.start, *(state for state in range(given.num_states) if state != given.start)]:
        for arc in order[begins[state] : begins[state + 1]].tolist():
            string, costs = "_".join(map(str, strings[arc].tolist())), _costs(given.costs[arc])
            label = "" if compact else f"{string}\t"
            tail = f"{costs},{string}" if compact else costs
            lines.append(f"{state}\t{given.target[arc]}\t{label}{given.word[arc]}\t{tail}")
        if state in finals:
            lines.append(f"{state}\t{_costs(given.final_costs[finals[state]])}{',' if compact else ''}")
    return ("\n".join(lines) + "\n\n").encode("ascii")


def _costs(values: np.ndarray) -> str:
    return ",".join(str(value) for value in np.asarray(values, np.float32))
