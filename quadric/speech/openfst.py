"""What is in a transducer of OpenFst, as arrays."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

import kaldifst
import numpy as np
from jaxtyping import Float32, Int32, Int64


class Contents(NamedTuple):
    """Costs of ending in each state, ``inf`` where that is impossible, and the arcs by their source.

    The costs of an arc are one number in a transducer, two (graph and acoustic) in a lattice.
    """

    final: Float32[np.ndarray, " S W"]
    source: Int32[np.ndarray, " A"]
    target: Int32[np.ndarray, " A"]
    input: Int32[np.ndarray, " A"]
    output: Int32[np.ndarray, " A"]
    cost: Float32[np.ndarray, " A W"]


def contents(fst: kaldifst.StdVectorFst | kaldifst.Lattice) -> Contents:
    """The states and arcs of ``fst``, which has a state at least."""
    costs = 2 if isinstance(fst, kaldifst.Lattice) else 1
    counts: Int64[np.ndarray, " S"] = np.array([fst.num_arcs(state) for state in range(fst.num_states)], np.int64)
    head_size, arc_size = costs + 2, costs + 3
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "fst"
        if not fst.write(str(file)):
            raise OSError(f"the graph could not be written to {folder}, where it is read from again: is the disk full?")
        size = 4 * (head_size * len(counts) + arc_size * int(counts.sum()))
        with file.open("rb") as stream:
            stream.seek(-size, 2)
            body = np.frombuffer(stream.read(), "<i4")
    # OpenFst's binary form ends in, for every state, its final costs (float32), the number of its arcs (int64) and the
    # arcs: input label, output label, costs (float32), target.
    head = head_size * np.arange(len(counts)) + arc_size * (np.cumsum(counts) - counts)
    heads = head[:, None] + np.arange(head_size)
    is_arc = np.ones(len(body), bool)
    is_arc[heads.ravel()] = False
    rows = body[is_arc].reshape(-1, arc_size)
    return Contents(
        final=body[heads[:, :costs]].view(np.float32),
        source=np.repeat(np.arange(len(counts), dtype=np.int32), counts),
        target=rows[:, -1].astype(np.int32),
        input=rows[:, 0].astype(np.int32),
        output=rows[:, 1].astype(np.int32),
        cost=rows[:, 2:-1].copy().view(np.float32),
    )
