"""What sequence losses are taken against: every utterance that allows it, the others counted with the reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from quadric.lattice.lattice import Lattice, StatePath
from quadric.lattice.paths import contains
from quadric.loss.sequence import MMI, MPE, SMBR
from quadric.loss.sequence_loss import SequenceLoss
from quadric.progress import silent
from quadric.recipes import digits
from quadric.speech.corpus import Corpus, Utterance
from quadric.train.criterion import AdamPerUtterance, Competitors, Criterion, SequenceTraining, SGDPerUtterance
from quadric.train.overrides import override
from quadric.train.sequence import Competition, LeftOut, targets
from reference.searches import lattice_paths, score
from reference.sequence import PDFS, utterance

pytestmark = pytest.mark.speech

FRAMES = (6, 9, 7, 5)


class Stored(Mapping[str, Lattice]):
    """Stands in for lattices in a folder."""

    def __init__(self, lattices: dict[str, Lattice]) -> None:
        self._lattices = lattices
        self.frames = sum(map(len, lattices.values()))
        self.arcs = sum(lattice.num_arcs for lattice in lattices.values())

    def __getitem__(self, id: str) -> Lattice:
        return self._lattices[id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._lattices)

    def __len__(self) -> int:
        return len(self._lattices)


class Scores:
    """Stands in for a network."""

    def posteriors(self, id: str) -> torch.Tensor:
        return torch.full((FRAMES[int(id[1:])], PDFS), 1 / PDFS)


def held(lattice: Lattice) -> StatePath:
    """A path that the lattice has."""
    arcs, state = [], 0
    for t in range(lattice.num_frames):
        arcs.append(next(a for a in range(lattice.frames[t], lattice.frames[t + 1]) if lattice.source[a] == state))
        state = lattice.target[arcs[-1]]
    return StatePath(lattice.pdf[arcs], lattice.phone[arcs], lattice.begins[arcs], 0.5)


def competition(**changes: object) -> Competition:
    """Of the utterances u0 to u3 and u9, which has no lattice; of u1 and u3 the lattice does not hold the reference."""
    made = {f"u{i}": utterance(i, frames) for i, frames in enumerate(FRAMES)}
    lattices = {id: lattice for id, (lattice, _, _) in made.items()}
    references = {id: path if id in ("u1", "u3") else held(lattices[id]) for id, (_, path, _) in made.items()}
    assert [contains(lattices[id], references[id]) for id in references] == [True, False, True, False]
    spoken = Corpus("train", tuple(Utterance(id, "ann", ("A",)) for id in (*made, "u8", "u9")))
    left_out = {"u9": LeftOut("no lattice", "no path"), "u8": LeftOut("too short for its words", "2 frames")}
    references["u9"] = references["u0"]
    frames = {id: len(path) for id, path in references.items()} | {"u8": 2}
    found = Competition(spoken, frames, Scores(), references, Stored(lattices), left_out)  # type: ignore[arg-type]
    return replace(found, **changes)  # type: ignore[arg-type]


def smbr(**options: object) -> SMBR:
    return SMBR(torch.zeros(PDFS), scale=0.5, **options)  # type: ignore[arg-type]


def test_references_are_added_where_they_are_missing() -> None:
    found = targets(competition(), smbr(), "add", silent, "train")
    assert list(found.targets) == ["u0", "u1", "u2", "u3"] and found.added == 2
    for id, target in found.targets.items():
        assert contains(target.lattice, target.reference)
        assert len(target) == FRAMES[int(id[1:])] and target.teacher is None
    made = competition().lattices
    assert found.targets["u0"].lattice.num_arcs == made["u0"].num_arcs
    assert found.targets["u1"].lattice.num_arcs == made["u1"].num_arcs + FRAMES[1]
    assert found.facts("train") == {
        "train: utterances": 4,
        "train: utterances left out": 2,
        "train: left out: no lattice": 1,
        "train: left out: too short for its words": 1,
        "train: references added to their lattices": 2,
        "train: arcs a frame of the lattices": round(made.arcs / sum(FRAMES), 1),
    }


def test_sharper_paths_have_their_probabilities_raised_to_a_power() -> None:
    """Of every path, by listing them."""
    plain, sharp = (targets(competition(), smbr(), "add", silent, "train", sharpness=by).targets for by in (1.0, 2.5))
    for id, target in sharp.items():
        assert target.reference.weight == 2.5 * plain[id].reference.weight
        silence = np.zeros((len(target), PDFS))
        before, after = (list(lattice_paths(of.lattice)) for of in (plain[id], target))
        assert len(before) == len(after) > 1
        for one, other in zip(before, after, strict=True):
            assert [step[:4] for step in one[0]] == [step[:4] for step in other[0]]
            assert score(*other, silence) == pytest.approx(2.5 * score(*one, silence), abs=1e-5)


def test_utterances_are_skipped_where_they_are_missing(caplog: pytest.LogCaptureFixture) -> None:
    found = targets(competition(), smbr(), "skip", silent, "dev")
    assert list(found.targets) == ["u0", "u2"] and found.added == 0
    assert found.facts("dev")["dev: left out: reference not in its lattice"] == 2
    assert "dev: of 6 utterances, left out 4 (u9: no path, u8: 2 frames, u1: " in caplog.text


@pytest.mark.parametrize("part", ["features", "reference", "lattice"])
def test_what_is_of_another_length_is_left_out(part: str) -> None:
    whole = competition()
    frames, references = dict(whole.frames), dict(whole.references)
    lattices = {id: whole.lattices[id] for id in whole.lattices}
    if part == "features":
        frames["u2"] += 1
    elif part == "lattice":
        lattices["u2"] = utterance(2, FRAMES[2] + 1)[0]
    else:
        references["u2"] = held(utterance(2, FRAMES[2] + 1)[0])
    changed = replace(whole, frames=frames, references=references, lattices=Stored(lattices))  # type: ignore[arg-type]
    found = targets(changed, smbr(), "add", silent, "train")
    assert list(found.targets) == ["u0", "u1", "u3"]
    lengths = {name: 7 + (name == part) for name in ("features", "reference", "lattice")}
    assert found.left_out["u2"] == LeftOut(
        "features, reference and lattice of different lengths",
        f"its features have {lengths['features']} frames, its reference {lengths['reference']}, its lattice "
        f"{lengths['lattice']}",
    )


class Picky(SMBR):
    """Has no target for utterances of few frames."""

    def target(self, lattice: Lattice, reference: StatePath, **options: object) -> object:  # type: ignore[override]
        if len(lattice) < 6:
            raise ValueError(f"{len(lattice)} frames are too few")
        return super().target(lattice, reference, **options)  # type: ignore[arg-type]


def test_what_the_criterion_has_no_target_for_is_left_out() -> None:
    found = targets(competition(), Picky(torch.zeros(PDFS), scale=1.0), "add", silent, "train")
    assert list(found.targets) == ["u0", "u1", "u2"] and found.added == 1
    assert found.left_out["u3"] == LeftOut("no target of the criterion", "5 frames are too few")


def test_a_set_of_which_nothing_is_left_is_refused() -> None:
    loss = SMBR(torch.zeros(2), scale=1.0)  # of too few pdfs for any lattice
    with pytest.raises(
        ValueError, match=r"^train: none of 6 utterances is left for sequence training: 6 \(u9: no path"
    ):
        targets(competition(), loss, "add", silent, "train")


class Unsure:
    """Stands in for a network of many pdfs: most of a frame is with the likeliest few, and much is not."""

    logits = 1.5 * torch.randn(max(FRAMES), 60, generator=torch.Generator().manual_seed(3))

    def posteriors(self, id: str) -> torch.Tensor:
        return torch.softmax(self.logits[: FRAMES[int(id[1:])]], -1)


def test_an_anchor_has_the_likeliest_of_the_first_network() -> None:
    loss = SMBR(torch.zeros(60), scale=0.5, anchor=0.1)
    found = targets(competition(scores=Unsure()), loss, "add", silent, "train")
    for id, target in found.targets.items():
        assert target.teacher is not None
        pdfs, probabilities = target.teacher
        assert pdfs.shape == (len(target), 20) and probabilities.dtype == np.float32
        everything = Unsure().posteriors(id).numpy()
        assert np.array_equal(np.take_along_axis(everything, pdfs, 1), probabilities)
        assert np.all(probabilities.min(1) >= np.sort(everything)[:, -21]) and 0.1 < target.unlisted < 0.5
    few = targets(competition(), smbr(anchor=0.1), "add", silent, "train").targets["u0"].teacher
    assert few is not None and few[0].shape == (FRAMES[0], PDFS)


def test_the_network_that_a_training_starts_from_is_where_its_anchor_holds_it() -> None:
    """Value and gradient of the divergence are 0 there, and no frame is drawn to be surer."""
    held, free = (SMBR(torch.zeros(60), scale=0.5, anchor=anchor) for anchor in (1.0, 0.0))
    made = targets(competition(scores=Unsure()), held, "add", silent, "train").targets
    for id, target in made.items():
        output = Unsure().logits[None, : FRAMES[int(id[1:])]].clone().requires_grad_()
        added = held(output, [target]) - free(output, [target])
        (gradient,) = torch.autograd.grad(added, output)
        assert abs(float(added.detach())) < 1e-5 and float(gradient.abs().max()) < 1e-6
        further = held(1.2 * output, [target]) - free(1.2 * output, [target])
        assert float(further.detach()) > 0.01


# ------------------------------------------------------------------------------------------------ the options


def test_a_criterion_has_its_options() -> None:
    prior = torch.linspace(-2.0, -1.0, PDFS)
    common = {"smoothing": 0.1, "anchor": 0.2, "curvature": "surrogate", "fisher": "utterance"}
    kinds: dict[type[SequenceLoss], Criterion] = {
        MMI: Criterion("mmi", boost=0.3, **common),  # type: ignore[arg-type]
        MPE: Criterion("mpe", accuracy="exact", **common),  # type: ignore[arg-type]
        SMBR: Criterion("smbr", one_silence_class=False, **common),  # type: ignore[arg-type]
    }
    for kind, criterion in kinds.items():
        loss = criterion.loss(prior, 0.7, 3)
        assert type(loss) is kind and torch.equal(loss.log_prior, prior)
        assert (loss.scale, loss.smoothing, loss.anchor, loss.jobs) == (0.7, 0.1, 0.2, 3)
        assert (loss.output_curvature.name, loss.fisher_over) == ("SURROGATE", "utterance")
        assert loss.silence_phones == (0,)  # type: ignore[attr-defined]
        assert getattr(loss, "boost", 0.3) == 0.3 and getattr(loss, "counts", "exact") == "exact"
    assert kinds[SMBR].loss(prior, 0.7, 1).one_silence_class is False  # type: ignore[attr-defined]
    assert Criterion("smbr").loss(prior, 0.7, 1).one_silence_class is True  # type: ignore[attr-defined]
    for other in (Criterion("mpe", accuracy="frame", one_silence_class=False),
                  Criterion("mmi", boost=0.1, one_silence_class=False)):  # fmt: skip
        assert other.loss(prior, 0.7, 1).one_silence_class is False  # type: ignore[attr-defined]
    assert Criterion(sharpness=2.0).loss(prior, 0.7, 1).scale == 1.4


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"kind": "mpfe"}, "kind=mpfe: must be 'mmi' or 'mpe' or 'smbr'"),
        ({"curvature": "hessian"}, "curvature=hessian: must be 'same_frame' or"),
        ({"fisher": "speaker"}, "fisher=speaker: must be 'frame' or 'utterance'"),
        ({"accuracy": "exact"}, "only mpe counts phones; kind is smbr"),
        ({"kind": "mpe", "one_silence_class": False}, "only where frames are counted"),
        ({"kind": "mmi", "one_silence_class": False}, "kind is mmi"),
        ({"sharpness": 0.0}, "sharpness=0.0: must be positive"),
        ({"smoothing": 1.0}, "smoothing=1.0: nothing would be left of smbr"),
    ],
)
def test_a_criterion_that_cannot_be_is_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError) as refused:
        Criterion(**options)
    assert problem in str(refused.value)


def test_competitors_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="missing=drop: must be 'add' or 'skip'"):
        Competitors(missing="drop")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend=wheel: must be 'quadric' or 'kaldi'"):
        Competitors(backend="wheel")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["sequence.start=unknown"], "sequence.start=unknown: no such training; choose one of adamw, hessian_free"),
        (["sequence.start=mpe_nghf", "sequence.criterion.kind=mpe"], "sequence.start=mpe_nghf: no such training"),
        (["sequence.criterion.kind=ctc"], "sequence.criterion.kind=ctc: must be 'mmi' or 'mpe' or 'smbr'"),
        (["sequence.criterion.scale=0"], "scale=0"),
        (["sequence.criterion.boost=0.1"], "only mmi is boosted; kind is smbr"),
        (["sequence.competitors.lattice.lattice_beam=20"], "must be from 0.001 to beam=13"),
        (["sequence.competitors.lm_order=0"], "lm_order=0"),
        (["sequence.competitors.missing=drop"], "must be 'add' or 'skip'"),
        (["sequence.competitors.backend=wheel"], "must be 'quadric' or 'kaldi'"),
        (["sequence.nghf=none"], "leave one in at least"),
        (["sequence.sgd.lr=0.1", "sequence.adam.optimizer=torch.optim.SGD"], "sgd and adam both have optimizer=SGD"),
        (["sequence.dropout=2"], "dropout=2"),
        (["sequence.nghf.metric=fisher"], "nghf.metric=fisher: a sequence criterion is no distribution"),
        (["sequence.natural_gradient.metric=fisher"], "natural_gradient.metric=fisher: a sequence criterion is no"),
    ],
)
def test_wrong_options(options: list[str], problem: str) -> None:
    with pytest.raises(ValueError) as refused:
        override(digits(48), options)
    assert problem in str(refused.value)


def test_trainings_are_named_by_criterion_and_optimiser() -> None:
    chosen = override(digits(48), ["sequence.criterion.kind=mmi", "sequence.sgd.lr=0.5", "sequence.start=hessian_free"])
    assert chosen.sequence is not None
    assert list(chosen.sequence.methods) == ["mmi_sgd", "mmi_nghf"] and chosen.sequence.start == "hessian_free"
    assert chosen.sequence.competitors == Competitors()
    both = SequenceTraining(sgd=SGDPerUtterance(), adam=AdamPerUtterance(), nghf=None)
    optimizers = [
        method.build(torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(1))])) for method in both.methods.values()
    ]
    assert [type(optimizer).__name__ for optimizer in optimizers] == ["SGD", "Adam"]
    assert [method.sampler.sizes.__self__.gradient for method in both.methods.values()] == [1, 1]  # type: ignore[attr-defined]
