"""Alignments from Kaldi's files, as references of sequence training on Kaldi's lattices.

    references = dict(read_references("exp/ali/ali.1.gz", transitions))
    for id, lattice, reference in with_references(read_lattices("exp/denlats/lat.1.gz", transitions), references):
        targets[id] = loss.target(lattice, reference)

An alignment has no weight in the graph of the lattices: Kaldi made it on another graph, that of its words. What the
lattices say of it is taken instead; see :func:`with_references`.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
from jaxtyping import Int32

from quadric.lattice.lattice import Lattice, StatePath
from quadric.lattice.paths import best_weight_of_phones, weight_in, with_path
from quadric.speech.kaldi_vectors import read_alignments
from quadric.speech.tables import few
from quadric.speech.transitions import TransitionModel

logger = logging.getLogger(__name__)


def read_references(
    path: str | os.PathLike[str],
    transitions: TransitionModel,
    *,
    reorder: bool = True,
    root: str | os.PathLike[str] | None = None,
) -> Iterator[tuple[str, StatePath]]:
    """The alignments of an archive or scp file as paths; see :func:`read_alignments` and :func:`reference_path`.

    Raises ``ValueError`` as they do, with file and utterance.
    """
    for id, ids in read_alignments(path, root=root):
        try:
            reference = reference_path(ids, transitions, reorder=reorder)
        except ValueError as error:
            raise ValueError(f"{path}: the alignment of {id}: {error}") from None
        yield id, reference


def reference_path(
    transition_ids: Int32[np.ndarray, " T"],
    transitions: TransitionModel,
    *,
    reorder: bool = True,
    weight: float = 0.0,
) -> StatePath:
    """An alignment of Kaldi, one transition-id a frame, as a path; phones are Kaldi's numbers minus 1.

    A phone begins with the first frame, and with the one behind the transition to the end of a phone. With ``reorder``
    the self loops of a phone's last state stand behind that transition, and still belong to the phone; so

        transition-ids   2 4 6 5 | 8 10 12 11    with ``reorder``
        transition-ids   2 4 5 6 | 8 10 11 12    without

    are two phones of four frames each, the odd ids being self loops.

    Args:
        transitions: of the model that made the alignment.
        reorder: whether self loops stand behind the transition that leaves their state, as in graphs that Kaldi made
            with ``--reorder=true``, its default; otherwise they stand in front of it. As for the lattices.
        weight: log probability of the path in the graph of the lattices, where it is known.

    Raises:
        ValueError: no row of integers, unknown transition-ids, transitions that cannot follow each other, or a last
            phone that does not end.
    """
    ids = np.asarray(transition_ids)
    if ids.ndim != 1 or not len(ids) or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"transition_ids must be one row of integers, one a frame, not {ids.dtype} of shape {ids.shape}"
        )
    outside = np.flatnonzero((ids < 1) | (ids > transitions.num_ids))
    if len(outside):
        raise ValueError(
            f"transition_ids holds {ids[outside[0]]} in frame {outside[0]}; the transition model has 1 to "
            f"{transitions.num_ids}: pass the model that made the alignment, and transition-ids, not pdfs or phones"
        )
    return StatePath(transitions.pdf[ids], transitions.phone[ids] - 1, _begins(ids, transitions, reorder), weight)


def _begins(ids: np.ndarray, transitions: TransitionModel, reorder: bool) -> np.ndarray:
    """Where phones begin. Raises ``ValueError`` for what the topology of the phones does not allow."""
    state, loop = transitions.state[ids], transitions.self_loop[ids]
    # A loop is of the state that the transition before it has left, or that the one behind it will leave.
    apart = np.append(False, state[1:] != state[:-1]) if reorder else np.append(state[1:] != state[:-1], False)
    apart[0] |= reorder
    wrong = np.flatnonzero(loop & apart)
    if len(wrong):
        raise ValueError(
            f"the transition-id {ids[wrong[0]]} in frame {wrong[0]} is a self loop of a state that the transition "
            f"{'before' if reorder else 'behind'} it does not leave, as it must when self loops stand "
            f"{'behind' if reorder else 'in front of'} that transition: pass reorder={not reorder}, or the transition "
            "model of the same system"
        )
    steps = np.flatnonzero(~loop) if reorder else np.arange(len(ids))
    taken = ids[steps]
    first = np.append(True, transitions.ends[taken[:-1]])
    phone, hmm_state = transitions.phone[taken], transitions.hmm_state[taken]
    goes_on = np.append(False, (phone[1:] == phone[:-1]) & (hmm_state[1:] == transitions.target[taken[:-1]]))
    wrong = np.flatnonzero(np.where(first, hmm_state != 0, ~goes_on))
    if len(wrong):
        what = (
            "begins a phone, but not in its first state" if first[wrong[0]] else "does not follow from the one before"
        )
        raise ValueError(
            f"the transition-id {taken[wrong[0]]} in frame {steps[wrong[0]]} {what}: the transition model belongs to "
            f"another system, or its self loops stand the other way: reorder={not reorder}"
        )
    if not transitions.ends[taken[-1]]:
        raise ValueError(
            f"the phone {transitions.phone[taken[-1]]} of the last frame does not end: the alignment is cut off, or of "
            "another system"
        )
    begins = np.zeros(len(ids), np.bool_)
    begins[steps[first]] = True
    return begins


def with_references(
    lattices: Iterable[tuple[str, Lattice]],
    references: Mapping[str, StatePath],
    *,
    missing: Literal["add", "skip", "keep"] = "add",
    unpaired: Literal["error", "drop"] = "error",
) -> Iterator[tuple[str, Lattice, StatePath]]:
    """Lattices with their references, ready for the target of a loss: id, lattice, reference.

    A reference that its lattice holds gets the weight it has there. For one that it does not hold (a determinised
    lattice has one alignment of every sentence, seldom to the frame that of the reference), ``missing`` says what is
    done:

    ``"add"``
        It is put into the lattice, so that MMI is never below 0. Its weight is the highest of the lattice's paths
        through the same phones (:func:`quadric.lattice.paths.best_weight_of_phones`): that of the same words, but for
        transitions within the phones. Where none has them, nothing is known of the weight, and the utterance is left
        out. Who knows the weight calls :func:`quadric.lattice.paths.with_path`.
    ``"skip"``
        The utterance is left out.
    ``"keep"``
        The lattice stays as it is, and so the weight of the reference: what Kaldi does. Its tools never add the
        alignment to the lattice, and leave its graph score out of MMI's value, a constant. (With ``drop-frames`` they
        have no gradient in frames whose aligned pdf the lattice lacks; here it stays.)

    How many are added and left out is logged when the lattices are at their end.

    Args:
        references: of :func:`read_references`; what weights they have is used by ``"keep"`` alone.
        unpaired: what to do about lattices without a reference and references without a lattice.

    Raises:
        ValueError: an option that is none; a lattice of other frames than its reference; the same id twice; none is
            left; unpaired ids, unless dropped: for a lattice at its turn, for references at the end, all at once.
    """
    if missing not in ("add", "skip", "keep"):
        raise ValueError(f"missing={missing!r} must be 'add', 'skip' or 'keep'")
    if unpaired not in ("error", "drop"):
        raise ValueError(f"unpaired={unpaired!r} must be 'error' or 'drop'")
    return _with_references(lattices, references, missing, unpaired == "drop")


def _with_references(
    lattices: Iterable[tuple[str, Lattice]], references: Mapping[str, StatePath], missing: str, drop: bool
) -> Iterator[tuple[str, Lattice, StatePath]]:
    seen: set[str] = set()
    alone, left_out, added = list[str](), list[str](), 0
    for id, lattice in lattices:
        if id in seen:
            raise ValueError(f"lattices holds {id} twice: read every archive once")
        if id not in references:
            if not drop:
                raise ValueError(
                    f"the lattice of {id} has no reference: read the alignments of all archives, or pass "
                    'unpaired="drop"'
                )
            alone.append(id)
            continue
        seen.add(id)
        reference = references[id]
        if len(reference) != len(lattice):
            raise ValueError(
                f"the alignment of {id} has {len(reference)} frames, its lattice {len(lattice)}: make both from the "
                "same features, with the same subsampling of frames"
            )
        weight = weight_in(lattice, reference)
        held = weight > -math.inf
        if not held and missing == "add":
            weight = best_weight_of_phones(lattice, reference)
        if weight > -math.inf:
            reference = replace(reference, weight=weight)
        elif missing != "keep":
            left_out.append(id)
            continue
        if not held and missing == "add":
            lattice, added = with_path(lattice, reference), added + 1
        yield id, lattice, reference
    _report(seen, left_out, alone, [id for id in references if id not in seen], added, drop)


def _report(
    seen: set[str], left_out: list[str], lattices: list[str], references: list[str], added: int, drop: bool
) -> None:
    if references and not drop:
        raise ValueError(
            f"references without a lattice: {few(references)}: read the lattices of all archives, or pass "
            'unpaired="drop"'
        )
    if not seen:
        raise ValueError("lattices and references have no utterance in common: read those of the same data")
    if len(left_out) == len(seen):
        raise ValueError(
            f"none of {len(seen)} references can be used: no lattice holds its own: pass the transition model and the "
            "reorder of both, and alignments and lattices of one system"
        )
    if added:
        logger.info("%d of %d references were not in their lattices, and were added", added, len(seen))
    for what, ids in (
        ("utterances whose lattices do not hold their references", left_out),
        ("lattices without a reference", lattices),
        ("references without a lattice", references),
    ):
        if ids:
            logger.warning("left out %s: %s", what, few(ids))
