"""What a network's outputs are: the states of phones, tied or not, and the graph over them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from quadric.model.acoustic import log_priors
from quadric.progress import Progress
from quadric.speech.graph import decoding_graph, write_graph
from quadric.speech.topology import Tying
from quadric.speech.tree import ContextStatistics, grow, retie
from quadric.train.flat_start import Aligned, Targets
from quadric.train.prepare import Prepared
from quadric.train.recipe import Job
from quadric.train.stages import Stages, digest, reading

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Units:
    """What the network's outputs are, and which of them each frame is."""

    tying: Tying
    train: Targets
    dev: Targets
    graph: Path

    @cached_property
    def log_prior(self) -> Float[np.ndarray, " C"]:
        """Of the outputs, by how often they occur in the training set."""
        counts = np.bincount(np.concatenate(list(self.train.values())), minlength=self.tying.num_pdfs)
        return log_priors(torch.from_numpy(counts)).float().numpy()


def choose_units(job: Job, prepared: Prepared, aligned: Aligned, stages: Stages, progress: Progress) -> Units:
    """Monophone states, or triphone states tied by a tree; and the graph over them."""
    tying, train, dev = aligned.tying, aligned.train, aligned.dev
    if job.tree is not None:
        key = digest(dict(train), prepared.key)

        def make_tree(folder: Path) -> None:
            assert job.tree is not None
            statistics = ContextStatistics.accumulate(
                train, prepared.features["train"], tying, cepstra=job.tree.cepstra, progress=progress
            )
            grow(statistics, job.tree).save(folder / "tying.npz")

        folder = stages.make("tree", key, job.tree, by=make_tree)
        with reading(folder):
            tied = Tying.load(folder / "tying.npz")
        train, dev = retie(train, tying, tied), retie(dev, tying, tied)
        tying = tied

    def make_graph(folder: Path) -> None:
        logger.info("composing the decoding graph: %d words, %d outputs", len(prepared.lexicon.words), tying.num_pdfs)
        write_graph(decoding_graph(prepared.lexicon, prepared.arpa, tying), folder / "graph.fst")

    graph = stages.make(
        "graph", prepared.lexicon, prepared.arpa.read_text(encoding="utf-8"), tying.table, tying.phones, by=make_graph
    )
    return Units(tying, train, dev, graph / "graph.fst")
