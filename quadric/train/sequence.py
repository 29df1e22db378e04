"""Sequence training: from a network trained by cross-entropy to one trained on what it is judged by.

The network that is there aligns the transcripts, which gives the references, and makes lattices over a weak language
model, which gives what they compete with. Both stay as they are while the network is trained; only the scores of the
arcs change with it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
from quadric.speech.tables import few
from quadric.speech.topology import Tying, phone_segments
from quadric.train.criterion import Competitors
from quadric.train.prepare import Prepared
from quadric.train.sources import Split
from quadric.train.stages import Stages, reading
from quadric.train.system import Likelihoods, System

logger = logging.getLogger(__name__)

_TEACHER = 20
"""Of another network's posteriors as many are kept a frame; the rest is shared among them."""


@dataclass(frozen=True)
class Competition:
    """What sequence training needs of one set: the references, and the lattices that hold what competes with them.

    Attributes:
        corpus: the utterances.
        scores: of the network that made both, unscaled.
        references: utterance id -> the alignment of its transcript.
        lattices: utterance id -> its lattice.
        left_out: utterance id -> why it has none of these.
    """

    corpus: Corpus
    scores: Likelihoods
    references: Mapping[str, StatePath]
    lattices: Lattices
    left_out: Mapping[str, str]

    def pairs(self, missing: str) -> Iterator[tuple[str, Lattice, StatePath]]:
        """Every utterance's lattice with its reference in it, added where it was missing or left out."""
        added = skipped = 0
        for id, reference in self.references.items():
            if id not in self.lattices:
                continue
            lattice = self.lattices[id]
            if not contains(lattice, reference):
                if missing == "skip":
                    skipped += 1
                    continue
                added += 1
                lattice = with_path(lattice, reference)
            yield id, lattice, reference
        if added or skipped:
            logger.info("references that were not in their lattices: %d added, %d utterances skipped", added, skipped)


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
) -> dict[Split, Competition]:
    """The references and lattices of the training and development sets, by ``system`` at the acoustic ``scale``.

    Args:
        key: names the system among those of the job.
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
        made = make_lattices(
            system.likelihoods({id: features[id] for id in references}, scale=scale),
            graph,
            options.lattice,
            stages.folder(f"lattices-{split}", options, scale, *place) / "store",
            jobs=jobs,
            progress=progress,
        )
        left_out |= made.skipped
        if left_out:
            logger.warning("%s: left out %d of %d utterances: %s", split, len(left_out), len(corpus), _listed(left_out))
        logger.info("%s: %d lattices, %.1f arcs a frame", split, len(made), made.arcs / max(1, made.frames))
        found[split] = Competition(corpus, scores, references, made, left_out)
    return found


def targets(
    competition: Competition, loss: SequenceLoss, missing: str, progress: Progress, *, what: str
) -> dict[str, SequenceTarget]:
    """What ``loss`` is taken against, for every utterance."""
    wanted: dict[str, SequenceTarget] = {}
    pairs = competition.pairs(missing)
    for id, lattice, reference in progress(pairs, total=len(competition.references), what=what):
        teacher = _likeliest(competition.scores.posteriors(id)) if loss.anchor else None
        wanted[id] = loss.target(lattice, reference, teacher=teacher)
    return wanted


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
) -> tuple[dict[str, StatePath], dict[str, str]]:
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
        if not aligned.pdfs:
            raise ValueError(f"no utterance could be aligned with its words: {_listed(aligned.failed)}")
        save_alignments(folder / "ali.ark", aligned.pdfs)

    folder = stages.make("references", *place, by=make)
    with reading(folder):
        pdfs = load_alignments(folder / "ali.ark")
    left_out = {u.id: "its words could not be aligned" for u in corpus if u.id not in pdfs}
    paths = {}
    for id, row in progress(pdfs.items(), total=len(pdfs), what="weights of the references"):
        weight = path_weight(graph, row)
        if np.isfinite(weight):
            paths[id] = state_path(row, system.tying, weight)
        else:
            left_out[id] = "the graph of competitors does not hold its words"
    return paths, left_out


def state_path(pdfs: Int32[np.ndarray, " T"], tying: Tying, weight: float = 0.0) -> StatePath:
    """An alignment as a path, with the phones that its pdfs belong to."""
    begins = np.zeros(len(pdfs), np.bool_)
    begins[[segment.start for segment in phone_segments(pdfs, tying)]] = True
    return StatePath(np.ascontiguousarray(pdfs, np.int32), tying.phone_of_pdf[pdfs], begins, weight)


def _likeliest(posteriors: Float[torch.Tensor, "T C"]) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest pdfs of every frame, and their probabilities, which sum to one."""
    top = posteriors.topk(min(_TEACHER, posteriors.shape[-1]), dim=-1)
    shares = top.values / top.values.sum(-1, keepdim=True)
    return top.indices.to(torch.int32).numpy(), shares.to(torch.float32).numpy()


def _listed(reasons: Mapping[str, str]) -> str:
    return few([f"{id}: {reason}" for id, reason in reasons.items()])
