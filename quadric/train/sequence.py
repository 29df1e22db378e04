"""Sequence training: from a network trained by cross-entropy to one trained on what it is judged by.

The network that is there aligns the transcripts, which gives the references, and makes lattices over a weak language
model, which gives what they compete with. Both stay as they are while the network is trained; only the scores of the
arcs change with it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int32

from quadric.lattice.labelled import LabelledAutomaton
from quadric.lattice.lattice import Lattice, StatePath
from quadric.lattice.paths import contains, path_weight, with_path
from quadric.loss.sequence import SequenceLoss, SequenceTarget
from quadric.progress import Progress
from quadric.speech.alignment import ForcedAlignment, align, load_alignments, save_alignments
from quadric.speech.corpus import Corpus
from quadric.speech.graph import decoding_graph, to_labelled
from quadric.speech.language_model import NGram
from quadric.speech.lattices import Lattices, make_lattices
from quadric.speech.topology import Tying, phone_segments
from quadric.train.criterion import Competitors, Missing
from quadric.train.left_out import LeftOut, counts, listed, not_aligned
from quadric.train.prepare import Prepared
from quadric.train.sources import Split
from quadric.train.stages import Stages, reading
from quadric.train.system import Likelihoods, System

logger = logging.getLogger(__name__)

_TEACHER = 20
"""Of another network's posteriors as many are kept a frame; the others count together."""


@dataclass(frozen=True)
class Competition:
    """What sequence training needs of one set: the references, and the lattices that hold what competes with them.

    Attributes:
        corpus: the utterances.
        frames: utterance id -> the number of frames of its features.
        scores: of the network that made both, unscaled.
        references: utterance id -> the alignment of its transcript.
        lattices: utterance id -> its lattice.
        left_out: utterance id -> why it has none of these.
    """

    corpus: Corpus
    frames: Mapping[str, int]
    scores: Likelihoods
    references: Mapping[str, StatePath]
    lattices: Lattices
    left_out: Mapping[str, LeftOut]


@dataclass(frozen=True)
class SequenceSet:
    """What a network is trained on or judged by, and what became of the utterances.

    Attributes:
        targets: utterance id -> what the loss is taken against.
        added: how many of them had to have their reference put into its lattice.
        left_out: utterance id -> why it has no target.
        density: arcs a frame of the lattices, as they were made.
    """

    targets: Mapping[str, SequenceTarget]
    added: int
    left_out: Mapping[str, LeftOut]
    density: float

    def facts(self, split: str) -> dict[str, object]:
        """For the report."""
        facts: dict[str, object] = {
            "utterances": len(self.targets),
            **counts(self.left_out),
            "references added to their lattices": self.added,
            "arcs a frame of the lattices": round(self.density, 1),
        }
        return {f"{split}: {name}": value for name, value in facts.items()}


def compete(
    options: Competitors,
    prepared: Prepared,
    system: System,
    scale: float,
    key: object,
    stages: Stages,
    progress: Progress,
    *,
    jobs: int,
    rank: int = 0,
) -> dict[Split, Competition]:
    """The references and lattices of the training and development sets, by ``system`` at the acoustic ``scale``.

    Args:
        key: names the system among those of the job.
        rank: of this process; those above 0 take the lattices that rank 0 has made before, and write none.
    """
    graph = _denominator(options, prepared, system.tying, stages)
    found: dict[Split, Competition] = {}
    sets: tuple[Split, ...] = ("train", "dev")
    for split in sets:
        corpus = prepared.perturbed if split == "train" and options.all_speeds else prepared.corpora[split]
        features = prepared.features[split]
        corpus = corpus.subset(u.id for u in corpus if u.id in features)
        scores = system.likelihoods(features)
        place = (split, key, prepared.key, [u.id for u in corpus])
        references, left_out = _references(corpus, scores, system, graph, place, stages, progress, jobs)
        scaled = system.likelihoods({id: features[id] for id in references}, scale=scale)
        made_by = (options.lattice, options.backend, options.lm_order, scale)
        store = stages.folder(f"lattices-{split}", *made_by, *place) / "store"
        made = (
            Lattices(store, scaled)
            if rank
            else make_lattices(
                scaled, graph, options.lattice, store, backend=options.backend, jobs=jobs, progress=progress
            )
        )
        left_out |= {id: LeftOut("no lattice", why) for id, why in made.skipped.items()}
        logger.info("%s: %d lattices, %.1f arcs a frame", split, len(made), made.arcs / max(1, made.frames))
        frames = {u.id: len(features[u.id]) for u in corpus}
        found[split] = Competition(corpus, frames, scores, references, made, left_out)
    return found


def targets(
    competition: Competition,
    loss: SequenceLoss,
    missing: Missing,
    progress: Progress,
    split: Split,
    *,
    sharpness: float = 1.0,
) -> SequenceSet:
    """What ``loss`` is taken against, for every utterance that allows it; the others are left out and told.

    A reference that its lattice does not hold is put into it, or, if ``missing`` says so, the utterance left out. The
    weights of all paths are then multiplied by ``sharpness``.

    Raises:
        ValueError: none is left.
    """
    wanted: dict[str, SequenceTarget] = {}
    left_out, added = dict(competition.left_out), 0
    ids = [id for id in competition.references if id in competition.lattices]
    for id in progress(ids, total=len(ids), what=f"{split}: targets"):
        lattice, reference = competition.lattices[id], competition.references[id]
        lengths = (competition.frames[id], len(reference), len(lattice))
        if len(set(lengths)) > 1:
            why = "its features have {} frames, its reference {}, its lattice {}".format(*lengths)
            left_out[id] = LeftOut("features, reference and lattice of different lengths", why)
            continue
        held = contains(lattice, reference)
        if not held and missing == "skip":
            left_out[id] = LeftOut("reference not in its lattice", "its lattice does not hold its reference")
            continue
        teacher = _likeliest(competition.scores.posteriors(id)) if loss.anchor else None
        whole = lattice if held else with_path(lattice, reference)
        try:
            wanted[id] = loss.target(*_sharpened(whole, reference, sharpness), teacher=teacher)
        except ValueError as error:
            left_out[id] = LeftOut("no target of the criterion", str(error))
            continue
        added += not held
    total = len(competition.corpus)
    if not wanted:
        raise ValueError(f"{split}: none of {total} utterances is left for sequence training: {listed(left_out)}")
    if added:
        logger.info("%s: %d references were not in their lattices, and were added", split, added)
    if left_out:
        logger.warning("%s: of %d utterances, left out %s", split, total, listed(left_out))
    made = competition.lattices
    return SequenceSet(wanted, added, left_out, made.arcs / made.frames)


def _denominator(options: Competitors, prepared: Prepared, tying: Tying, stages: Stages) -> LabelledAutomaton:
    """The graph of what competes: the training text's language model of a low order."""
    sentences = [utterance.words for utterance in prepared.corpora["train"]]

    def make(folder: Path) -> None:
        arpa = folder / "lm.arpa"
        NGram.estimate(sentences, prepared.lexicon.words, options.lm_order).write_arpa(arpa)
        logger.info("composing the graph of competitors: %d-gram, %d outputs", options.lm_order, tying.num_pdfs)
        to_labelled(decoding_graph(prepared.lexicon, arpa, tying), tying).save(folder / "graph.npz")

    key = (options.lm_order, sentences, prepared.lexicon, tying.table, tying.phones)
    folder = stages.make("competitors", *key, by=make)
    with reading(folder):
        return LabelledAutomaton.load(folder / "graph.npz")


def _references(
    corpus: Corpus,
    scores: Likelihoods,
    system: System,
    graph: LabelledAutomaton,
    place: tuple[object, ...],
    stages: Stages,
    progress: Progress,
    jobs: int,
) -> tuple[dict[str, StatePath], dict[str, LeftOut]]:
    """Forced alignments with their weight in the graph of competitors, and why others have none."""

    def make(folder: Path) -> None:
        aligned = align(
            {u.id: u.words for u in corpus},
            ((u.id, scores[u.id]) for u in corpus),
            system.lexicon,
            system.tying,
            options=ForcedAlignment(on_too_short="drop"),
            jobs=jobs,
            progress=progress,
        )
        failed = not_aligned(aligned)
        if not aligned.pdfs:
            raise ValueError(f"no utterance could be aligned with its words: {listed(failed)}")
        save_alignments(folder / "ali.ark", aligned.pdfs)
        (folder / "left_out.json").write_text(json.dumps(failed))

    folder = stages.make("references", "with reasons", *place, by=make)
    with reading(folder):
        pdfs = load_alignments(folder / "ali.ark")
        reasons = json.loads((folder / "left_out.json").read_text())
        left_out = {id: LeftOut(*reason) for id, reason in reasons.items()}
    paths = {}
    for id, row in progress(pdfs.items(), total=len(pdfs), what="weights of the references"):
        weight = path_weight(graph, row)
        if np.isfinite(weight):
            paths[id] = state_path(row, system.tying, weight)
        else:
            left_out[id] = LeftOut("not in the graph of competitors", "the graph of competitors lacks its words")
    return paths, left_out


def state_path(pdfs: Int32[np.ndarray, " T"], tying: Tying, weight: float = 0.0) -> StatePath:
    """An alignment as a path, with the phones that its pdfs belong to."""
    begins = np.zeros(len(pdfs), np.bool_)
    begins[[segment.start for segment in phone_segments(pdfs, tying)]] = True
    return StatePath(np.ascontiguousarray(pdfs, np.int32), tying.phone_of_pdf[pdfs], begins, weight)


def _sharpened(lattice: Lattice, reference: StatePath, by: float) -> tuple[Lattice, StatePath]:
    """Both with their weights in the graph multiplied."""
    weight = (by * lattice.weight).astype(np.float32)
    return (
        replace(lattice, weight=weight, final=by * lattice.final),
        replace(reference, weight=by * reference.weight),
    )


def _likeliest(posteriors: Float[torch.Tensor, "T C"]) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest pdfs of every frame, and their probabilities."""
    top = posteriors.topk(min(_TEACHER, posteriors.shape[-1]), dim=-1)
    return top.indices.to(torch.int32).numpy(), top.values.to(torch.float32).numpy()
