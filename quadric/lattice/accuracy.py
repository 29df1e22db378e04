"""How much of a reference every arc of a lattice has right, so that the sum along a path is the path's accuracy.

State and frame-phone accuracy count frames; the phone accuracies count phones. What counts as an error of silence
differs between systems, and here it is an option.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
from jaxtyping import Bool, Float32, Int32

from quadric.lattice.lattice import Lattice, StatePath
from quadric.lattice.refine import with_edit_distance, with_phone_starts

MAX_STATES = 2_000_000
"""What the exact phone accuracy may make of a lattice."""


def state_accuracy(
    lattice: Lattice, reference: StatePath, silence_phones: Sequence[int] = (), one_silence_class: bool = True
) -> Float32[np.ndarray, " A"]:
    """1 for an arc that emits the reference's pdf in its frame, else 0: the accuracy of sMBR.

    Args:
        lattice: the paths.
        reference: of as many frames.
        silence_phones: the phones that are silence.
        one_silence_class: as in Kaldi; true: any silence in place of any other is right; false: silence is never
            right, so that insertions of words into silence cost nothing and deletions gain nothing.

    Raises:
        ValueError: reference and lattice have different frames.
    """
    return _frame_accuracy(lattice, reference, lattice.pdf, reference.pdf, silence_phones, one_silence_class)


def frame_phone_accuracy(
    lattice: Lattice, reference: StatePath, silence_phones: Sequence[int] = (), one_silence_class: bool = True
) -> Float32[np.ndarray, " A"]:
    """`state_accuracy` with phones in place of pdfs: the minimum phone frame error (MPFE) of Kaldi."""
    return _frame_accuracy(lattice, reference, lattice.phone, reference.phone, silence_phones, one_silence_class)


def _frame_accuracy(
    lattice: Lattice,
    reference: StatePath,
    found: Int32[np.ndarray, " A"],
    wanted: Int32[np.ndarray, " T"],
    silence_phones: Sequence[int],
    one_silence_class: bool,
) -> Float32[np.ndarray, " A"]:
    _check_frames(lattice, reference)
    same, silent = found == wanted[lattice.frame], np.isin(lattice.phone, silence_phones)
    if one_silence_class:
        right = same | (silent & np.isin(reference.phone, silence_phones)[lattice.frame])
    else:
        right = same & ~silent
    return right.astype(np.float32)


def approximate_phone_accuracy(
    lattice: Lattice, reference: StatePath, silence_phones: Sequence[int] = ()
) -> tuple[Lattice, Float32[np.ndarray, " A2"]]:
    """The accuracy of MPE: what a phone has right is told from its overlap with the phones of the reference.

    A phone q of the path is worth the most that a phone z of the reference gives it: -1 + 2 e where they are the same,
    -1 + e otherwise, with e the share of z's frames that q overlaps (D. Povey, "Discriminative training for large
    vocabulary speech recognition", PhD thesis, 2003, section 6.2). So a phone that overlaps nothing is an insertion:
    -1. Silence, of the path and of the reference, is left out.

    Args:
        lattice: the paths.
        reference: of as many frames.
        silence_phones: the phones that are silence.

    Returns:
        The lattice `with_phone_starts`, and its arcs' values: a phone's is on the arc of its last frame.

    Raises:
        ValueError: reference and lattice have different frames.
    """
    _check_frames(lattice, reference)
    refined = with_phone_starts(lattice)
    starts = np.flatnonzero(reference.begins)
    bounds = np.append(starts, len(reference)).astype(np.int64)
    phones = reference.phone[starts]
    silent = np.isin(phones, silence_phones)
    value = _overlaps(
        refined.source,
        refined.target,
        refined.phone,
        refined.frame,
        _begins(refined),
        _ends(refined),
        bounds,
        np.where(silent, -1, phones).astype(np.int32),
        np.cumsum(reference.begins) - 1,
        np.isin(np.arange(refined.phone.max() + 1), silence_phones),
        refined.num_states,
    )
    return refined, value


def exact_phone_accuracy(
    lattice: Lattice, reference: StatePath, silence_phones: Sequence[int] = (), *, max_states: int = MAX_STATES
) -> tuple[Lattice, Float32[np.ndarray, " A2"]]:
    """The phones of the reference minus the edit distance of the path's phones to them; silence is left out.

    Args:
        lattice: the paths.
        reference: of as many frames.
        silence_phones: the phones that are silence.
        max_states: the states that the refined lattice may have; it grows with the different mistakes of its paths.

    Returns:
        The lattice refined by the edit distances of what was said so far, and its arcs' values: on the first frame of
        a phone, by how much it lowers the distance (-1, 0 or 1).

    Raises:
        ValueError: reference and lattice have different frames; more than ``max_states`` states.
    """
    _check_frames(lattice, reference)
    phones = reference.phone[reference.begins]
    spoken = phones[~np.isin(phones, silence_phones)]
    silent = np.isin(lattice.phone, silence_phones)
    symbol = np.where(_begins(lattice) & ~silent, lattice.phone, -1).astype(np.int32)
    return with_edit_distance(lattice, symbol, spoken, max_states)


def spoken_phones(reference: StatePath, silence_phones: Sequence[int] = ()) -> int:
    """How many phones a path has that are not silence: its own phone accuracy, exact or approximate."""
    return int((~np.isin(reference.phone[reference.begins], silence_phones)).sum())


def right_frames(reference: StatePath, silence_phones: Sequence[int] = (), one_silence_class: bool = True) -> int:
    """How many frames a path has right of itself, by states or by phones."""
    if one_silence_class:
        return len(reference)
    return int((~np.isin(reference.phone, silence_phones)).sum())


def _check_frames(lattice: Lattice, reference: StatePath) -> None:
    if len(lattice) != len(reference):
        raise ValueError(
            f"reference has {len(reference)} frames, the lattice {len(lattice)}: they must be of one utterance, "
            "at one frame rate"
        )


def _begins(lattice: Lattice) -> Bool[np.ndarray, " A"]:
    """Whether an arc is the first frame of a phone; those of frame 0 are."""
    begins = lattice.begins.copy()
    begins[: lattice.frames[1]] = True
    return begins


def _ends(refined: Lattice) -> Bool[np.ndarray, " A"]:
    """Whether an arc is the last frame of its phone, which a lattice `with_phone_starts` knows."""
    follows = np.ones(refined.num_states, np.bool_)
    follows[refined.source] = _begins(refined)
    return follows[refined.target]


@numba.njit(nogil=True, cache=True)
def _overlaps(source, target, phone, frame, begins, ends, bounds, wanted, at, silent, num_states):  # type: ignore[no-untyped-def]  # pragma: no cover
    """The value of every arc: that of the phone that ends with it, 0 on all others.

    Phone z of the reference takes the frames from ``bounds[z]`` to ``bounds[z + 1]`` and is ``wanted[z]``, -1 for
    silence; frame t is of phone ``at[t]``. The label of a phone of the lattice is that of its first frame.
    """
    began, label = np.empty(num_states, np.int64), np.empty(num_states, np.int32)
    value = np.zeros(len(source), np.float32)
    for a in range(len(source)):
        start = frame[a] if begins[a] else began[source[a]]
        q = phone[a] if begins[a] else label[source[a]]
        began[target[a]], label[target[a]] = start, q
        if not ends[a] or silent[q]:
            continue
        best = -1.0
        for z in range(at[start], at[frame[a]] + 1):
            if wanted[z] >= 0:
                shared = min(bounds[z + 1], frame[a] + 1) - max(bounds[z], start)
                e = shared / (bounds[z + 1] - bounds[z])
                best = max(best, -1.0 + (2.0 * e if wanted[z] == q else e))
        value[a] = best
    return value
