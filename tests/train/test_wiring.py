"""Every option of a job reaches the part that it is meant for: with stand-ins for the parts, in no time."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from quadric.comm.communicator import Solo
from quadric.data.augment import SpecAugment
from quadric.data.stream import FrameStream
from quadric.lattice.generate import LatticeOptions
from quadric.linalg.krylov import ConjugateGradient
from quadric.linalg.truncation import RelativeProgress
from quadric.loss.loss import CrossEntropy
from quadric.loss.sequence import MPE
from quadric.objective.curvature import Curvature
from quadric.optim.damping import AfterRejection, LevenbergMarquardt
from quadric.optim.descent import NewtonCG
from quadric.optim.precondition import LBFGS, FisherDiagonal
from quadric.optim.sampling import FixedSizes, GeometricSizes, VarianceTested
from quadric.optim.search import BestIterate
from quadric.optim.second_order import SecondOrder, natural_gradient, nghf
from quadric.progress import silent
from quadric.recipes import digits
from quadric.speech.corpus import Corpus, Utterance
from quadric.speech.features import Fbank
from quadric.speech.language_model import NGram
from quadric.speech.normalisation import Normalisation
from quadric.speech.scoring import read_text
from quadric.speech.topology import Tying, monophone
from quadric.train import checkpoint, finished, pipeline, sequence, trainers, training, weights
from quadric.train.criterion import Competitors, Criterion, SequenceTraining, SGDPerUtterance
from quadric.train.flat_start import Aligned
from quadric.train.method import NGHF, FirstOrder, HessianFree, Method, NaturalGradient
from quadric.train.metrics import MetricsLog
from quadric.train.plan import Plan
from quadric.train.prepare import Prepared
from quadric.train.recipe import Job, Network
from quadric.train.sequence import LeftOut, SequenceSet
from quadric.train.stages import Stages
from quadric.train.system import Front
from quadric.train.trainer import Trainer
from quadric.train.units import Units
from reference.toy_language import LEXICON, triphone

pytestmark = pytest.mark.speech

MONO = monophone(LEXICON.phones)
FIRST_ORDER = FirstOrder(
    epochs=2.5,
    gradient_frames=70,
    patience=3,
    optimizer=torch.optim.RMSprop,
    lr=0.5,
    weight_decay=0.25,
    arguments={"momentum": 0.6},
    warmup=0.2,
    floor=0.1,
)
HESSIAN_FREE = HessianFree(
    epochs=1.5,
    gradient_frames=90,
    patience=4,
    curvature_frames=30,
    sampling="geometric",
    gradient_growth=1.1,
    curvature_growth=1.5,
    curvature_most=80,
    damping=0.3,
    max_steps=7,
    tolerance=0.01,
    momentum=0.4,
    preconditioner="lbfgs",
)


def defaults(kind: type) -> dict[str, Any]:
    """Of the options of ``kind`` that have one."""
    return {
        option.name: option.default if option.default_factory is dataclasses.MISSING else option.default_factory()
        for option in dataclasses.fields(kind)
        if (option.default, option.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
    }


def job(**options: Any) -> Job:
    """A job none of whose options for training is what it is by itself."""
    return replace(
        digits(),
        network=Network("tdnn", (6,), offsets=((-2, 0, 1),), norm="none", dropout=0.3, activation="tanh"),
        augment=SpecAugment(1, 2, 1, 3),
        chunk=7,
        autocast=True,
        seed=11,
        first_order=FIRST_ORDER,
        hessian_free=HESSIAN_FREE,
        **options,
    )


def corpus(name: str, count: int) -> Corpus:
    return Corpus(name, tuple(Utterance(f"{name}{i:02d}", f"speaker{i % 2}", ("A", "B")) for i in range(count)))


def prepared(tying: Tying = MONO) -> tuple[Prepared, Units]:
    """Sets of noise, of each of which one utterance has no alignment."""
    rng = np.random.default_rng(3)
    corpora = {split: corpus(split, 5) for split in ("train", "dev", "test")}
    features = {
        split: {u.id: rng.normal(size=(20 + i, 4)).astype(np.float32) for i, u in enumerate(utterances)}
        for split, utterances in corpora.items()
    }
    train, dev = (
        {id: rng.integers(0, tying.num_pdfs, len(rows)) for id, rows in list(features[split].items())[1:]}
        for split in ("train", "dev")
    )
    front = Front(Fbank(), Normalisation())
    ready = Prepared(corpora, corpora["train"], features, front, LEXICON, Path("lm.arpa"), {})
    return ready, Units(tying, train, dev, Path("graph.fst"))


def recording(kind: Callable[..., Any], calls: list[dict[str, Any]], result: Callable[..., Any]) -> Callable[..., Any]:
    """Stands in for ``kind``: notes the arguments of a call by their names, and gives what ``result`` does."""

    def called(*args: Any, **kwargs: Any) -> Any:
        calls.append(dict(inspect.signature(kind).bind(*args, **kwargs).arguments))
        return result(*args, **kwargs)

    return called


# ------------------------------------------------------------------------------------------------ training


class Untrained:
    """Stands in for a `Trainer`."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def fit(self, *, progress: object, what: str) -> Mapping[str, float]:
        return {"loss": 1.0, "accuracy": 0.5}


@pytest.mark.parametrize("method", [FIRST_ORDER, HESSIAN_FREE], ids=["first order", "Hessian-free"])
def test_a_training_is_given_all_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Method) -> None:
    streams: list[dict[str, Any]] = []
    trainings: list[dict[str, Any]] = []
    monkeypatch.setattr(training, "FrameStream", recording(FrameStream, streams, FrameStream))
    monkeypatch.setattr(trainers, "Trainer", recording(Trainer, trainings, Untrained))
    chosen, (ready, units) = job(), prepared()
    for name in ("network", "augment", "chunk", "autocast", "seed"):
        assert getattr(chosen, name) != defaults(Job)[name]
    alone = Solo()
    folder = training.trained(chosen, "a name", method, ready, units, Stages(tmp_path), silent, alone)
    (made,), (train, held_out) = trainings, streams

    torch.manual_seed(chosen.seed)
    model = chosen.network.build(4, MONO.num_pdfs)
    assert np.ptp(units.log_prior) > 0.5
    model.initialise_output_bias(torch.from_numpy(units.log_prior))
    assert made["model"].state_dict().keys() == model.state_dict().keys()
    for key, value in made["model"].state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key

    seen = {
        split: {id: ready.features[split][id] for id in targets}
        for split, targets in (("train", units.train), ("dev", units.dev))
    }
    assert train == {
        "features": seen["train"],
        "targets": units.train,
        "context": (2, 1),
        "chunk": 7,
        "seed": 11,
        "transform": chosen.augment,
        "shard": (0, 1),
    }
    assert held_out == {"features": seen["dev"], "targets": units.dev, "context": (2, 1), "chunk": None}

    plan = Plan(method.epochs, method.sampler, autocast=True, seed=11, patience=method.patience)
    assert method.patience
    assert made["plan"] == plan and made["folder"] == folder and folder.name.startswith("a name-")
    assert made["communicator"] is alone
    assert isinstance(made["loss"], CrossEntropy) and made["schedule"] == method.schedule
    assert type(made["optimizer"]) is type(method.build(model))
    stepped = [p for group in made["optimizer"].param_groups for p in group["params"]]
    assert list(map(id, stepped)) == list(map(id, made["model"].parameters()))
    assert made["stream"].total_frames == sum(map(len, units.train.values()))
    assert made["held_out"].total_frames == sum(map(len, units.dev.values()))


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("network", Network("tdnn", (5,), offsets=((-2, 0, 1),))),
        ("augment", None),
        ("chunk", 8),
        ("autocast", False),
        ("seed", 12),
    ],
)
def test_a_training_told_otherwise_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, other: object
) -> None:
    monkeypatch.setattr(trainers, "Trainer", Untrained)
    (ready, units), stages = prepared(), Stages(tmp_path)
    first, again, changed = (
        training.trained(chosen, "name", FIRST_ORDER, ready, units, stages, silent)
        for chosen in (job(), job(), replace(job(), **{part: other}))
    )
    assert first == again != changed


def test_a_first_order_optimiser_has_its_options() -> None:
    assert all(getattr(FIRST_ORDER, name) != value for name, value in defaults(FirstOrder).items())
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = FIRST_ORDER.build(nn.ParameterList([parameter]))
    assert type(optimizer) is torch.optim.RMSprop
    (group,) = optimizer.param_groups
    assert group["params"] == [parameter]
    assert (group["lr"], group["weight_decay"], group["momentum"]) == (0.5, 0.25, 0.6)
    schedule, rates = FIRST_ORDER.schedule(optimizer, 50), []
    for _ in range(50):
        rates.append(group["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.5 / 10) and rates[9] == rates[10] == 0.5 == max(rates)
    assert rates[30] == pytest.approx(0.5 * (0.1 + 0.9 / 2))  # halfway down
    assert group["lr"] == pytest.approx(0.5 * 0.1)


def test_a_hessian_free_optimiser_has_its_options() -> None:
    assert all(getattr(HESSIAN_FREE, name) != value for name, value in defaults(HessianFree).items())
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = HESSIAN_FREE.build(nn.ParameterList([parameter]))
    assert isinstance(optimizer, SecondOrder)
    assert optimizer.descent == NewtonCG(ConjugateGradient(7, RelativeProgress(0.01), pairs=LBFGS().pairs), 0.4)
    assert optimizer.preconditioner == LBFGS()
    assert optimizer.rule == LevenbergMarquardt(0.3)
    assert HESSIAN_FREE.sampler == GeometricSizes(90, 30, 1.1, 1.5, most=80)
    assert replace(HESSIAN_FREE, sampling="variance").sampler == VarianceTested(90, share=1 / 3)
    assert replace(HESSIAN_FREE, sampling="fixed").sampler == FixedSizes(90, 30)
    assert FIRST_ORDER.sampler == FixedSizes(70)
    (group,) = optimizer.param_groups
    assert group["params"] == [parameter] and group["damping"] == 0.3
    other = torch.optim.SGD([parameter], lr=0.7)
    schedule, rates = HESSIAN_FREE.schedule(other, 5), set()
    for _ in range(5):
        other.step()
        schedule.step()
        rates.add(other.param_groups[0]["lr"])
    assert rates == {0.7}


@pytest.mark.parametrize("kind", [NaturalGradient, NGHF])
def test_natural_methods_have_their_options(kind: type[NaturalGradient]) -> None:
    options = {"gradient_growth": 1.1, "curvature_growth": 1.5, "curvature_most": 80, "preconditioner": "diagonal"}
    options |= {"patience": 5, "metric": "gauss_newton", "damping": 0.2, "candidates": "backwards"}
    method = kind(epochs=1.5, gradient_frames=90, curvature_frames=30, sampling="variance", iterations=5, **options)
    assert method.sampler == VarianceTested(90, share=1 / 3)
    assert all(getattr(method, name) != value for name, value in defaults(kind).items())
    chosen = replace(digits(), first_order=None, hessian_free=None, **{method.name: method})
    assert chosen.methods == {method.name: method}
    optimizer = method.build(nn.ParameterList([nn.Parameter(torch.zeros(3))]))
    assert isinstance(optimizer, SecondOrder) and optimizer.preconditioner == FisherDiagonal()
    assert optimizer.descent.metric is optimizer.descent.kind is Curvature.GAUSS_NEWTON
    assert optimizer.search == BestIterate(candidates="backwards")
    assert optimizer.rule == AfterRejection(initial=0.2)
    for metric in ("empirical_fisher", "fisher"):
        other = replace(method, metric=metric).build(nn.ParameterList([nn.Parameter(torch.zeros(3))]))
        assert isinstance(other, SecondOrder) and other.descent.metric is Curvature[metric.upper()]
    solvers = [getattr(optimizer.descent, name, None) for name in ("solver", "natural")]
    assert {solver.max_steps for solver in solvers if solver is not None} == {5}


@pytest.mark.parametrize(("kind", "build"), [(NaturalGradient, natural_gradient), (NGHF, nghf)])
def test_natural_methods_default_to_those_of_the_library(kind: type[NaturalGradient], build: Any) -> None:
    parameter = nn.Parameter(torch.zeros(3))
    ours, theirs = kind().build(nn.ParameterList([parameter])), build([parameter])
    for part in ("descent", "search", "rule", "preconditioner"):
        assert getattr(ours, part) == getattr(theirs, part)


def test_the_report_notes_why_a_training_ended_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finished, "scores", lambda folder: {})
    checkpoint.save({"model": {"w": torch.zeros(3)}, "update": 40, "loss": 1.25}, tmp_path / "model.pt")
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"update": 40, "seconds": 2.0, "dev_loss": 1.25})
    assert finished._run_of("sgd", tmp_path, "mmi").notes == "lowest held-out loss 1.2500 after update 40"
    log.append({"update": 60, "seconds": 3.0, "dev_loss": 1.5, "ended": "no lower held-out loss in 3 looks"})
    run = finished._run_of("sgd", tmp_path, "mmi")
    assert run.notes == "lowest held-out loss 1.2500 after update 40; no lower held-out loss in 3 looks"
    assert (run.updates, run.parameters, run.criterion) == (60, 3, "mmi")


# ------------------------------------------------------------------------------------------------ realignment


def test_a_realignment_is_by_the_trained_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tri = triphone(LEXICON.phones)
    chosen, (ready, units) = job(), prepared(tri)
    torch.manual_seed(0)
    best = chosen.network.build(ready.dimension, tri.num_pdfs)
    trained = tmp_path / "realign-1"
    trained.mkdir()
    checkpoint.save({"model": best.state_dict()}, trained / "model.pt")
    trainings: list[dict[str, Any]] = []
    alignments: list[dict[str, Any]] = []
    rng = np.random.default_rng(5)
    pdfs = {
        split: {id: rng.integers(0, tri.num_pdfs, len(rows)).astype(np.int32) for id, rows in features.items()}
        for split, features in (("train", ready.features["train"]), ("dev", ready.features["dev"]))
    }
    monkeypatch.setattr(training, "trained", recording(training.trained, trainings, lambda *_: trained))
    monkeypatch.setattr(training, "viterbi", recording(training.viterbi, alignments, lambda *_: pdfs))
    before = Aligned(MONO, {"train00": np.zeros(20, np.int32)}, {"dev00": np.zeros(20, np.int32)})
    after = training.realigned(chosen, FIRST_ORDER, ready, before, units, Stages(tmp_path), silent)

    (made,), (alignment,) = trainings, alignments
    assert made["method"] is FIRST_ORDER and made["name"] == "realign" and made["units"] is units
    assert (alignment["job"], alignment["prepared"], alignment["tying"]) == (chosen, ready, tri)
    model = alignment["model"]
    assert not model.training
    for key, value in best.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    np.testing.assert_array_equal(alignment["log_prior"], units.log_prior)
    assert np.ptp(units.log_prior) > 0.5
    assert after.tying is MONO
    for split, found in (("train", after.train), ("dev", after.dev)):
        assert found.keys() == pdfs[split].keys()
        for id, row in found.items():
            np.testing.assert_array_equal(MONO.phone_of_pdf[row], tri.phone_of_pdf[pdfs[split][id]])
            np.testing.assert_array_equal(MONO.state_of_pdf[row], tri.state_of_pdf[pdfs[split][id]])


# ------------------------------------------------------------------------------------------------ decoding


@pytest.mark.parametrize(
    ("utterances", "count", "places"),
    [(10, 4, [0, 3, 6, 9]), (9, 3, [0, 4, 8]), (5, 5, [0, 1, 2, 3, 4]), (3, 9, [0, 1, 2]), (7, 1, [0])],
)
def test_a_part_of_a_corpus_is_spread_over_it(utterances: int, count: int, places: list[int]) -> None:
    whole = corpus("dev", utterances)
    part = weights._spread(whole, count)
    assert part.name == whole.name
    assert [u.id for u in part] == [whole.utterances[place].id for place in places]


def test_the_errors_reported_are_those_of_what_was_recognised(tmp_path: Path) -> None:
    spoken = corpus("test", 6)
    words = {u.id: u.words for u in spoken}
    words |= {"test01": ("A",), "test02": ("A", "A"), "test03": ("A", "B", "B"), "test05": ()}
    for split in ("dev", "test"):
        finished.scoring.write_text(tmp_path / split / "text", words)
        pipeline.write_decoded(tmp_path / split, spoken, words)
    score = finished.scores(tmp_path)["test"]
    total = score.total
    assert (total.words, total.insertions, total.deletions, total.substitutions) == (12, 1, 3, 1)
    assert (tmp_path / "test" / "wer").read_text().splitlines()[0] == "%WER 41.67 [ 5 / 12, 1 ins, 3 del, 1 sub ]"
    assert {speaker: errors.errors for speaker, errors in score.per_speaker.items()} == {"speaker0": 1, "speaker1": 4}
    counted = [line for line in (tmp_path / "test" / "per_utt").read_text().splitlines() if " #csid " in line]
    assert sum(sum(map(int, line.split()[3:])) for line in counted) == 5
    assert read_text(tmp_path / "test" / "ref") == {u.id: u.words for u in spoken}


# ------------------------------------------------------------------------------------------------ sequence training


@dataclass(frozen=True)
class Likely:
    """Stands in for likelihoods: which features, and at which scale."""

    features: Mapping[str, np.ndarray]
    scale: float


@dataclass(frozen=True)
class Scoring:
    """Stands in for a system."""

    model: nn.Module
    lm_weight: float = 4.0
    tying: Tying = MONO

    def likelihoods(self, features: Mapping[str, np.ndarray], *, scale: float = 1.0) -> Likely:
        return Likely(features, scale)


class Made(dict[str, Any]):
    """Stands in for lattices: of all utterances but one."""

    frames, arcs = 10, 30

    def __init__(self, scores: Likely) -> None:
        super().__init__(dict.fromkeys(list(scores.features)[1:]))
        self.skipped = {next(iter(scores.features)): "no path"}


COMPETITORS = Competitors(LatticeOptions(9.0, 3.0, 77), lm_order=3, missing="skip", all_speeds=True, backend="kaldi")


def test_competitors_are_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(getattr(COMPETITORS, name) != value for name, value in defaults(Competitors).items())
    references: list[dict[str, Any]] = []
    lattices: list[dict[str, Any]] = []
    orders: list[int] = []

    def estimate(sentences: list[tuple[str, ...]], words: tuple[str, ...], order: int) -> NGram:
        assert sentences == [("A", "B")] * 5 and words == LEXICON.words
        orders.append(order)
        return NGram.estimate(sentences, words, order)

    def referred(held: Any, *_: Any) -> Any:
        *ids, last = [u.id for u in held]
        return dict.fromkeys(ids), {last: LeftOut("too short", "2 frames")}

    monkeypatch.setattr(sequence, "NGram", type("Estimating", (), {"estimate": staticmethod(estimate)}))
    monkeypatch.setattr(sequence, "_references", recording(sequence._references, references, referred))
    monkeypatch.setattr(
        sequence, "make_lattices", recording(sequence.make_lattices, lattices, lambda scores, *_, **__: Made(scores))
    )
    ready, _ = prepared()
    faster = tuple(replace(u, id=f"sp1.1-{u.id}") for u in ready.corpora["train"])
    features = dict(ready.features["train"])
    features |= {u.id: np.zeros((9, 4), np.float32) for u in faster}
    both = Corpus("train", (*ready.corpora["train"], *faster))
    ready = replace(ready, perturbed=both, features={**ready.features, "train": features})
    for all_speeds, utterances in ((True, 10), (False, 5)):
        options = replace(COMPETITORS, all_speeds=all_speeds)
        found = sequence.compete(
            options, ready, Scoring(nn.Linear(1, 1)), 0.25, "key", Stages(tmp_path), silent, jobs=3  # type: ignore[arg-type]
        )  # fmt: skip
        assert [len(found[split].corpus) for split in ("train", "dev")] == [utterances, 5]
        assert found["train"].frames == {id: len(features[id]) for id in found["train"].corpus.by_id}
        for split, made, referred_to in zip(found, lattices[-2:], references[-2:], strict=True):
            assert made["options"] == LatticeOptions(9.0, 3.0, 77) and made["jobs"] == referred_to["jobs"] == 3
            assert made["backend"] == "kaldi"
            assert made["scores"].scale == 0.25 and referred_to["scores"].scale == found[split].scores.scale == 1.0
            assert list(made["scores"].features) == list(found[split].references)
            kinds = [reason.kind for reason in found[split].left_out.values()]
            assert kinds == ["too short", "no lattice"]
    assert orders == [3]  # once, for both
    stores = {made["store"] for made in lattices}
    assert len(stores) == 3  # of train twice, of dev once
    options = replace(COMPETITORS, missing="add")
    again = sequence.compete(options, ready, Scoring(nn.Linear(1, 1)), 0.25, "key", Stages(tmp_path), silent, jobs=1)  # type: ignore[arg-type]
    assert again.keys() == found.keys() and {made["store"] for made in lattices} == stores
    others = ({"lm_order": 2}, {"lattice": LatticeOptions()}, {"backend": "quadric"})
    for other in (replace(COMPETITORS, **changed) for changed in others):  # type: ignore[arg-type]
        sequence.compete(other, ready, Scoring(nn.Linear(1, 1)), 0.25, "key", Stages(tmp_path), silent, jobs=1)  # type: ignore[arg-type]
        assert lattices[-1]["store"] not in stores and lattices[-2]["store"] not in stores
    # Other ranks open what the first has made.
    opened: list[dict[str, Any]] = []
    opening = recording(sequence.Lattices, opened, lambda store, scores: Made(scores))
    monkeypatch.setattr(sequence, "Lattices", opening)
    count = len(lattices)
    scoring: Any = Scoring(nn.Linear(1, 1))
    also = sequence.compete(options, ready, scoring, 0.25, "key", Stages(tmp_path), silent, jobs=1, rank=1)
    assert len(lattices) == count and {made["store"] for made in opened} < stores
    for split, competition in also.items():
        assert competition.left_out == again[split].left_out and [*competition.lattices] == [*again[split].lattices]


@pytest.mark.parametrize("scale", [None, 0.7])
def test_a_sequence_training_is_given_all_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: float | None
) -> None:
    criterion = Criterion("mpe", scale, 3.0, accuracy="frame", smoothing=0.1, anchor=0.2, fisher="utterance")
    ways = {"sgd": SGDPerUtterance(lr=0.3), "nghf": NGHF(iterations=2)}
    chosen = job(sequence=SequenceTraining(criterion, COMPETITORS, "hessian_free", dropout=0.15, **ways))
    ready, units = prepared()
    torch.manual_seed(1)
    first = replace(chosen.network, dropout=0.0).build(4, MONO.num_pdfs)
    (tmp_path / "hessian_free-1").mkdir()
    (tmp_path / "hessian_free").symlink_to("hessian_free-1")
    loads: list[Path] = []
    rooms: dict[str, list[dict[str, Any]]] = {"compete": [], "targets": [], "fit": []}

    def load(folder: Path) -> Scoring:
        loads.append(folder)
        return Scoring(first)

    def aimed(competition: str, *_: Any, **__: Any) -> SequenceSet:
        left_out = {"u9": LeftOut("no lattice", f"no path for {competition}")}
        return SequenceSet({competition: None}, 1, left_out, 2.5)  # type: ignore[dict-item]

    results = {"compete": lambda *_, **__: {"train": "T", "dev": "D"}, "targets": aimed, "fit": lambda *_, **__: None}
    monkeypatch.setattr(pipeline, "System", type("Loading", (), {"load": staticmethod(load)}))
    for name, calls in rooms.items():
        monkeypatch.setattr(pipeline, name, recording(getattr(pipeline, name), calls, results[name]))
    monkeypatch.setattr(pipeline, "_tested", lambda *_: None)
    facts = pipeline._train_sequences(chosen, chosen.sequence, tmp_path, ready, units, Stages(tmp_path), silent, Solo())

    assert facts["dev: utterances"] == 1 and facts["train: arcs a frame of the lattices"] == 2.5
    assert loads == [tmp_path / "hessian_free" / "system"]
    (competing,), (train, dev) = rooms["compete"], rooms["targets"]
    kappa = 0.25 if scale is None else scale
    assert (competing["options"], competing["scale"], competing["key"]) == (COMPETITORS, kappa, "hessian_free-1")
    assert competing["jobs"] == chosen.jobs and competing["prepared"] is ready and competing["rank"] == 0
    assert (train["competition"], dev["competition"]) == ("T", "D")
    assert train["sharpness"] == dev["sharpness"] == 3.0
    assert train["missing"] == dev["missing"] == "skip" and train["loss"] is dev["loss"]
    loss = train["loss"]
    assert isinstance(loss, MPE) and (loss.scale, loss.counts, loss.smoothing) == (3.0 * kappa, "frame", 0.1)
    np.testing.assert_array_equal(loss.log_prior.numpy(), units.log_prior)
    assert [made["name"] for made in rooms["fit"]] == ["mpe_sgd", "mpe_nghf"]
    for made, method in zip(rooms["fit"], ways.values(), strict=True):
        assert made["method"] is method and made["loss"] is loss and made["chunk"] is None
        assert (made["sets"].train, made["sets"].dev) == ({"T": None}, {"D": None})
        for key, value in first.state_dict().items():
            assert torch.equal(made["model"].state_dict()[key], value), key
        assert {part.p for part in made["model"].modules() if isinstance(part, nn.Dropout)} == {0.15}
        assert made["folder"].name.startswith(made["name"] + "-")
        assert (made["folder"] / "left_out").read_text() == "train u9 no path for T\ndev u9 no path for D\n"
    again = pipeline._train_sequences(chosen, chosen.sequence, tmp_path, ready, units, Stages(tmp_path), silent, Solo())
    assert again == facts
    assert [len(calls) for calls in rooms.values()] == [1, 2, 2], "what is finished needs no lattices"
