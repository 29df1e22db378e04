"""The words in a lattice: those of the best path, and how near any path comes to what was said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np
from jaxtyping import Float, Float32, Int32

from quadric.lattice.lattice import Lattice


@dataclass(frozen=True)
class Rescorable:
    """What the best words of a lattice under other weights depend on: of each arc, what is said of it apart.

    Attributes:
        source, target: states of each arc.
        word: its label, 0 for none.
        graph: its weight in the graph.
        acoustic: its score.
        final: of the last states.
        num_states, num_frames: of the lattice.
    """

    source: Int32[np.ndarray, " A"]
    target: Int32[np.ndarray, " A"]
    word: Int32[np.ndarray, " A"]
    graph: Float32[np.ndarray, " A"]
    acoustic: Float32[np.ndarray, " A"]
    final: Float[np.ndarray, " F"]
    num_states: int
    num_frames: int

    @classmethod
    def of(cls, lattice: Lattice, scores: Float[np.ndarray, "T C"]) -> Rescorable:
        """A lattice and its scores, natural logarithms.

        Raises ``ValueError`` if ``scores`` are of another number of frames, have too few columns, or hold NaN or
        ``+inf``.
        """
        if np.ndim(scores) != 2 or len(scores) != lattice.num_frames or scores.shape[1] < lattice.num_pdfs:
            raise ValueError(
                f"scores has shape {np.shape(scores)}; the lattice has {lattice.num_frames} frames and emits pdf "
                f"{lattice.num_pdfs - 1}"
            )
        acoustic = np.asarray(scores)[lattice.frame, lattice.pdf].astype(np.float32)
        if np.any(np.isnan(acoustic) | np.isposinf(acoustic)):
            raise ValueError("scores must hold natural logarithms, neither NaN nor +inf: the network has diverged")
        return cls(
            lattice.source, lattice.target, lattice.word, lattice.weight, acoustic, lattice.final,
            lattice.num_states, lattice.num_frames,
        )  # fmt: skip

    def best_words(self, acoustic_scale: float = 1.0, word_penalty: float = 0.0) -> tuple[int, ...]:
        """The labels along the best path; of equals, the first.

        Args:
            acoustic_scale: of the scores.
            word_penalty: cost of every word, in nats.
        """
        values = self.graph + acoustic_scale * self.acoustic.astype(np.float64) - word_penalty * (self.word > 0)
        path = _best_path(self.source, self.target, values, self.final, self.num_states, self.num_frames)
        words = self.word[path]
        return tuple(words[words > 0].tolist())


def best_words(lattice: Lattice, scores: Float[np.ndarray, "T C"]) -> tuple[int, ...]:
    """The labels along the best path under the weights of the lattice and ``scores``, see `Rescorable`."""
    return Rescorable.of(lattice, scores).best_words()


def oracle_errors(lattice: Lattice, words: Sequence[int]) -> int:
    """The fewest insertions, deletions and substitutions between ``words`` and the labels of any path.

    Args:
        words: the labels of the reference: indices in the list of words + 1; 0 for a word that is not in the list.

    Raises ``ValueError`` for a negative label.
    """
    reference = np.asarray(list(words), np.int64)
    if np.any(reference < 0):
        raise ValueError(f"words holds the label {reference.min()}: labels are indices in the list of words + 1")
    return int(
        _oracle_errors(
            *(lattice.source, lattice.target, lattice.word, reference, lattice.num_states, len(lattice.final))
        )
    )


@numba.njit(nogil=True, cache=True)
def _best_path(source, target, values, final, num_states, num_frames):  # type: ignore[no-untyped-def]  # pragma: no cover
    """The arcs of the best path."""
    alpha, by = np.full(num_states, -np.inf), np.full(num_states, -1, np.int64)
    alpha[0] = 0.0
    for a in range(len(source)):
        x = alpha[source[a]] + values[a]
        if x > alpha[target[a]] or by[target[a]] < 0:
            alpha[target[a]], by[target[a]] = x, a
    state = num_states - len(final) + np.argmax(alpha[num_states - len(final) :] + final)
    path = np.empty(num_frames, np.int64)
    for t in range(num_frames - 1, -1, -1):
        path[t] = by[state]
        state = source[path[t]]
    return path


@numba.njit(nogil=True, cache=True)
def _oracle_errors(source, target, word, reference, num_states, num_final):  # type: ignore[no-untyped-def]  # pragma: no cover
    """errors[s, j]: the fewest on the way to state s with j words of the reference behind."""
    length = len(reference)
    errors = np.full((num_states, length + 1), np.iinfo(np.int32).max // 2, np.int32)
    errors[0, 0] = 0
    done = -1  # words of the reference may be left out on the way to states up to this
    for a in range(len(source)):
        s, t = source[a], target[a]
        if s > done:
            done = s
            for j in range(length):
                errors[s, j + 1] = min(errors[s, j + 1], errors[s, j] + 1)
        if word[a] == 0:
            for j in range(length + 1):
                errors[t, j] = min(errors[t, j], errors[s, j])
            continue
        for j in range(length + 1):
            errors[t, j] = min(errors[t, j], errors[s, j] + 1)
            if j < length:
                errors[t, j + 1] = min(errors[t, j + 1], errors[s, j] + (word[a] != reference[j]))
    fewest = errors[0, 0] + np.iinfo(np.int32).max // 2
    for s in range(num_states - num_final, num_states):
        for j in range(length + 1):
            fewest = min(fewest, errors[s, j] + length - j)
    return fewest
