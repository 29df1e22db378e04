from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("kaldifst", reason="needs the speech extra")

import kaldifst

from quadric.speech.epsilons import Transducer, epsilons_before, epsilons_behind, numbered, read_transducer
from reference.graph_paths import said_by_arrays, said_by_fst

pytestmark = pytest.mark.speech

Row = tuple[int, int, int, int, float]


def transducer(arcs: list[Row], final: dict[int, float], states: int = 0) -> kaldifst.StdVectorFst:
    """From arcs (source, target, pdf + 1, word, cost) and final costs; state 0 is the start."""
    fst = kaldifst.StdVectorFst()
    for _ in range(max(states, 1 + max([*final, *(max(arc[:2]) for arc in arcs)]))):
        fst.add_state()
    fst.start = 0
    for source, target, label, word, cost in arcs:
        fst.add_arc(source, kaldifst.StdArc(label, word, cost, target))
    for state, cost in final.items():
        fst.set_final(state, cost)
    return fst


@st.composite
def transducers(draw: st.DrawFn) -> kaldifst.StdVectorFst:
    """Six states; an arc without a pdf leads to a higher state. Some words are on arcs with, some on others."""
    arcs = []
    for _ in range(draw(st.integers(1, 14))):
        source, target = draw(st.integers(0, 5)), draw(st.integers(0, 5))
        label = draw(st.integers(0, 2)) if source < target else draw(st.integers(1, 2))
        word = draw(st.sampled_from([0, 0, 0, 1, 2]))
        arcs.append((source, target, label, word, draw(st.sampled_from([0.0, 0.5, 1.25]))))
    final = draw(st.dictionaries(st.integers(0, 5), st.sampled_from([0.0, 2.0]), min_size=1))
    return transducer(arcs, final, 6)


def check_trimmed(graph: Transducer) -> None:
    """Every state is on a complete path, every arc emits, and no two arcs are the same."""
    arcs = graph.arcs
    assert np.all(arcs.pdf >= 0)
    edges = list(zip(arcs.source.tolist(), arcs.target.tolist(), strict=True))
    ahead, back = {graph.start}, {s for s in range(graph.num_states) if graph.final[s] > -np.inf}
    for _ in range(graph.num_states):
        ahead |= {target for source, target in edges if source in ahead}
        back |= {source for source, target in edges if target in back}
    assert ahead == set(range(graph.num_states))
    assert back | {graph.start} == ahead
    rows = np.stack([arcs.source, arcs.target, arcs.pdf, arcs.word, arcs.own_loop])
    assert len(np.unique(rows, axis=1).T) == len(arcs)
    assert np.all(np.diff(arcs.source) >= 0)


@given(transducers())
def test_every_way_to_say_something_keeps_its_weight(fst: kaldifst.StdVectorFst) -> None:
    """All pdf sequences up to four frames; transducers with too many words at one place are refused."""
    try:
        whole = read_transducer(fst)
    except ValueError as error:
        assert "accepts nothing" in str(error)
        return
    behind = numbered(epsilons_behind(whole))
    check_trimmed(behind)
    try:
        before = numbered(epsilons_before(whole))
        check_trimmed(before)
    except ValueError as error:
        assert "put " in str(error) and "between them" in str(error)
        before = None
    for frames in range(5):
        for pdfs in product((0, 1), repeat=frames):
            expected = said_by_fst(fst, pdfs)
            total = np.logaddexp.reduce([-np.inf, *expected.values()])
            assert said_by_arrays(behind, pdfs).get((), -np.inf) == pytest.approx(total, abs=1e-9)
            if before is not None and frames:
                assert said_by_arrays(before, pdfs) == pytest.approx(expected, abs=1e-9)


def test_two_words_before_the_second_frame_take_a_frame_each() -> None:
    """A word on an epsilon at the start, and one on the first arc that emits: as one-phone words in triphones are."""
    fst = transducer(
        [(0, 1, 0, 7, 0.5), (1, 2, 1, 8, 0.25), (0, 2, 1, 9, 0.0), (2, 2, 1, 0, 1.0), (2, 3, 2, 0, 2.0)], {3: 0.0}
    )
    graph = numbered(epsilons_before(read_transducer(fst)))
    check_trimmed(graph)
    assert said_by_arrays(graph, [0, 1]) == pytest.approx({(7, 8): -2.75, (9,): -2.0})
    assert said_by_arrays(graph, [0, 0, 0, 1]) == pytest.approx({(7, 8): -4.75, (9,): -4.0})
    arcs = graph.arcs
    assert sorted(zip(arcs.own_loop.tolist(), arcs.word.tolist(), strict=True)) == [
        *[(False, 0), (False, 7), (False, 8), (False, 9)],
        *[(True, 0), (True, 8)],
    ]


@pytest.mark.parametrize(
    ("arcs", "said"),
    [
        ([(0, 1, 0, 1, 0.0), (1, 2, 0, 2, 0.0), (2, 3, 1, 0, 0.0)], "two words on one path of epsilon arcs"),
        ([(0, 1, 0, 1, 0.0), (1, 2, 1, 2, 0.0), (2, 3, 0, 3, 0.0), (3, 3, 1, 0, 0.0)], "three words"),
        ([(0, 1, 0, 1, 0.0), (1, 2, 1, 2, 0.0), (2, 3, 1, 3, 0.0)], "no room"),
        ([(0, 1, 0, 1, 0.0), (1, 3, 1, 2, 0.0)], "no room"),
        ([(0, 1, 1, 0, 0.0), (1, 2, 0, 0, 0.0), (2, 1, 0, 0, 0.0), (2, 3, 1, 0, 0.0)], "cycle of epsilon arcs"),
    ],
)
def test_what_has_no_meaning_or_no_room_is_refused(arcs: list[Row], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        epsilons_before(read_transducer(transducer(arcs, {3: 0.0})))


def test_a_graph_is_read_without_what_leads_nowhere() -> None:
    fst = transducer([(0, 1, 3, 5, 0.5), (0, 2, 1, 0, 0.0), (3, 1, 1, 0, 0.0), (1, 1, 3, 0, 1.5)], {1: 0.25})
    graph = read_transducer(fst)
    assert graph.final.tolist() == [-np.inf, -0.25]
    rows = zip(*(values.tolist() for values in vars(graph.arcs).values()), strict=True)
    assert list(rows) == [(0, 1, 2, 5, -0.5, False), (1, 1, 2, 0, -1.5, True)]
