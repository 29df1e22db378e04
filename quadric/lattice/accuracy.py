"""How much of a reference every arc of a lattice has right, so that the sum along a path is the path's accuracy.

State and frame-phone accuracy count frames; the phone accuracies count phones. What counts as an error of silence
differs between systems, and here it is an option.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int32

from quadric.lattice.lattice import Lattice, StatePath
from quadric.lattice.refine import first_frames, with_edit_distance, with_overlap

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
        The lattice `with_overlap`, and its arcs' values: a phone's is on the arc of its last frame.

    Raises:
        ValueError: reference and lattice have different frames.
    """
    _check_frames(lattice, reference)
    starts = np.flatnonzero(reference.begins)
    phones = reference.phone[starts]
    wanted = np.where(np.isin(phones, silence_phones), -1, phones).astype(np.int32)
    silent = np.isin(np.arange(lattice.phone.max() + 1), silence_phones)
    return with_overlap(lattice, np.append(starts, len(reference)), wanted, silent)


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
    symbol = np.where(first_frames(lattice) & ~silent, lattice.phone, -1).astype(np.int32)
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
