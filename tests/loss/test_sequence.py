from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian

pytest.importorskip("numba", reason="needs the lattice extra")

from quadric.lattice.lattice import Lattice, StatePath
from quadric.loss.sequence import MMI, MPE, SMBR
from quadric.loss.sequence_loss import SequenceLoss
from quadric.loss.sequence_target import OutputCurvature, SequenceTarget
from quadric.objective.curvature import Curvature
from quadric.objective.objective import Objective
from reference import dense
from reference import sequence as twin

C = 5
PRIOR = torch.log_softmax(torch.tensor([0.3, -1.0, 0.2, 1.5, 0.0], dtype=torch.float64), 0)
FRAMES = [6, 4]


@dataclass(frozen=True)
class Criterion:
    """A loss, and which accuracy its twin is to count."""

    loss: Callable[..., SequenceLoss]
    kind: str
    silence: tuple[int, ...] = ()
    one_class: bool = True
    boost: float = 0.0

    def build(self, **options: Any) -> SequenceLoss:
        known = {"silence_phones": self.silence, "one_silence_class": self.one_class}
        known |= {"boost": self.boost} if self.loss is MMI else {}
        known |= {"accuracy": self.kind} if self.loss is MPE else {}
        return self.loss(PRIOR, scale=0.7, **known, **options)


CRITERIA = {
    "MMI": Criterion(MMI, "mmi"),
    "boosted MMI": Criterion(MMI, "mmi", (0,), boost=0.8),
    "MPE": Criterion(MPE, "approximate", (0,)),
    "MPE, exact": Criterion(MPE, "exact", (1,)),
    "MPE, frames": Criterion(MPE, "frame", (0,), one_class=False),
    "sMBR": Criterion(SMBR, "state"),
    "sMBR, silence": Criterion(SMBR, "state", (0, 1)),
}
ROUNDED = ("boosted MMI", "MPE")
"""Their arcs have weights or values that single precision rounds."""
RISKS = [name for name in CRITERIA if "MMI" not in name]


UTTERANCES = [twin.utterance(seed, frames) for seed, frames in zip((80, 46), FRAMES, strict=True)]
OUTPUT = torch.randn(2, 7, C, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def targets(loss: SequenceLoss) -> list[SequenceTarget]:
    return [loss.target(lattice, reference, teacher=teacher) for lattice, reference, teacher in UTTERANCES]


def twin_of(criterion: Criterion, loss: SequenceLoss, output: Tensor) -> Tensor:
    total = output.new_zeros(())
    for x, (lattice, reference, teacher) in zip(output, UTTERANCES, strict=True):
        own = x[: len(reference)]
        if criterion.loss is MMI:
            worth = twin.worths(lattice, reference, "frame", criterion.silence, criterion.one_class) * criterion.boost
            one = twin.mmi(own, PRIOR, loss.scale, lattice, reference, worth)
        else:
            worth = twin.worths(lattice, reference, criterion.kind, criterion.silence, criterion.one_class)
            one = twin.risk(own, PRIOR, loss.scale, lattice, worth, most(criterion, reference))
        log_p = torch.log_softmax(own, -1)
        divergence = twin.divergence(own, teacher)
        entropy = nn.functional.nll_loss(log_p, torch.from_numpy(reference.pdf).long(), reduction="sum")
        total = total + (1 - loss.smoothing) * one + loss.smoothing * entropy + loss.anchor * divergence
    return total


def most(criterion: Criterion, reference: StatePath) -> float:
    """The accuracy of the reference as the one path of a lattice."""
    frames = len(reference)
    arcs = [(t, t + 1, int(reference.pdf[t])) for t in range(frames)]
    chain = Lattice.from_arcs(arcs, final={frames: 0.0}, phone=reference.phone, begins=reference.begins)
    return float(twin.worths(chain, reference, criterion.kind, criterion.silence, criterion.one_class))


EXTRAS = [{}, {"smoothing": 0.2, "anchor": 0.6}]


@pytest.mark.parametrize("extra", EXTRAS, ids=["plain", "smoothed"])
@pytest.mark.parametrize("name", CRITERIA)
def test_value_and_gradient_are_those_of_the_listed_paths(name: str, extra: dict[str, float]) -> None:
    criterion = CRITERIA[name]
    loss = criterion.build(**extra)
    output = OUTPUT.clone().requires_grad_()
    value, expected = loss(output, targets(loss)), twin_of(criterion, loss, output)
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if name in ROUNDED else {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(value, expected, **tolerance)
    (gradient,), (wanted,) = (torch.autograd.grad(x, output) for x in (value, expected))
    torch.testing.assert_close(gradient, wanted, **tolerance)
    assert not gradient[0, 6:].any() and not gradient[1, 4:].any()
    with torch.no_grad():
        torch.testing.assert_close(loss(output, targets(loss)), expected.detach(), **tolerance)


@pytest.mark.parametrize("extra", EXTRAS, ids=["plain", "smoothed"])
@pytest.mark.parametrize("name", CRITERIA)
def test_curvatures_are_the_hessian_its_blocks_and_what_stands_for_them(name: str, extra: dict[str, float]) -> None:
    criterion = CRITERIA[name]
    plain = criterion.build(**extra)
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if name in ROUNDED else {"rtol": 1e-9, "atol": 1e-11}
    v = torch.randn(OUTPUT.shape, dtype=torch.float64)
    of_classes = torch.zeros(2, 7, C, C, dtype=torch.float64)
    for block, x, (_, reference, (pdfs, _)) in zip(of_classes, OUTPUT, UTTERANCES, strict=True):
        block[: len(reference)] = plain.anchor * twin.fisher_of_classes(x[: len(reference)], pdfs)
    without = criterion.build(**extra | {"anchor": 0.0})
    H = hessian(lambda z: twin_of(criterion, without, z), OUTPUT)
    H = H + torch.einsum("btce,bd,tu->btcdue", of_classes, torch.eye(2).double(), torch.eye(7).double())

    def product(kind: OutputCurvature) -> Tensor:
        loss = criterion.build(**extra, curvature=kind)
        return loss.curvature(OUTPUT, targets(loss))(v)

    torch.testing.assert_close(product(OutputCurvature.LATTICE), torch.einsum("btcdue,due->btc", H, v), **tolerance)
    blocks = torch.einsum("btcbte->btce", H)
    same_frame = torch.einsum("btce,bte->btc", blocks, v)
    torch.testing.assert_close(product(OutputCurvature.SAME_FRAME), same_frame, **tolerance)

    share = 1 - plain.smoothing
    slope, occupancy = slopes(criterion, plain)
    p = torch.softmax(OUTPUT, -1) * torch.tensor([[t < frames for t in range(7)] for frames in FRAMES])[..., None]
    frames = plain.smoothing * (torch.diag_embed(p) - p[..., None] * p[..., None, :]) + of_classes
    k = share * plain.scale**2
    surrogate = k * (torch.diag_embed(occupancy) - occupancy[..., None] * occupancy[..., None, :]) + frames
    printed = k * (torch.diag_embed(slope) - slope[..., None] * occupancy[..., None, :]) + frames
    for kind, matrix in ((OutputCurvature.SURROGATE, surrogate), (OutputCurvature.PRINTED, printed)):
        torch.testing.assert_close(product(kind), torch.einsum("btce,bte->btc", matrix, v), **tolerance)
    if name in RISKS and not extra:
        eigenvalues = torch.linalg.eigvalsh(blocks.flatten(0, 1))
        assert bool(((eigenvalues[:, 0] < -1e-6) & (eigenvalues[:, -1] > 1e-6)).any())  # indefinite


def slopes(criterion: Criterion, loss: SequenceLoss) -> tuple[Tensor, Tensor]:
    """The derivatives in the scores: of the criterion (for MMI: of log Z), and of log Z."""
    scores = torch.zeros_like(OUTPUT).requires_grad_()
    flat, plain = torch.zeros_like(PRIOR), criterion.build()
    log_z, values = [], []
    for x, s, (lattice, reference, _) in zip(OUTPUT, scores, UTTERANCES, strict=True):
        own = (loss.scale * (x - PRIOR) + s)[: len(reference)]
        kind = "frame" if criterion.loss is MMI else criterion.kind
        worth = twin.worths(lattice, reference, kind, criterion.silence, criterion.one_class)
        totals = twin.Listed.of(lattice).scores(own)
        if criterion.loss is MMI:
            totals = totals - plain.boost * worth  # type: ignore[operator]
        log_z.append(torch.logsumexp(totals, 0) + flat.sum())
        values.append(log_z[-1] if criterion.loss is MMI else -(torch.softmax(totals, 0) * worth).sum())
    slope, occupancy = (torch.autograd.grad(sum(x), scores, retain_graph=True)[0] for x in (values, log_z))
    return slope, occupancy


@pytest.mark.parametrize("name", CRITERIA)
def test_second_derivatives_by_autograd_are_exact(name: str) -> None:
    loss = CRITERIA[name].build(smoothing=0.2, anchor=0.3)
    given = targets(loss)
    output = OUTPUT.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, given), (output,))
    assert torch.autograd.gradgradcheck(lambda x: loss(x, given), (output,))


@pytest.mark.parametrize("kind", OutputCurvature)
@pytest.mark.parametrize("name", ["MMI", "sMBR"])
def test_a_schedule_changes_nothing_that_was_asked_for_before(name: str, kind: OutputCurvature) -> None:
    loss = CRITERIA[name].build(curvature=kind, smoothing=0.2, anchor=0.3)
    given, v = targets(loss), torch.randn(OUTPUT.shape, dtype=torch.float64)
    output = OUTPUT.clone().requires_grad_()

    def asked() -> list[Callable[[], Tensor]]:
        value = loss(output, given)
        (slope,) = torch.autograd.grad(value, output, create_graph=True)
        curved, fisher = loss.curvature(OUTPUT, given), loss.fisher(OUTPUT, given)
        return [
            lambda: curved(v),
            lambda: fisher(v),
            lambda: torch.autograd.grad(value, output, retain_graph=True)[0],
            lambda: torch.autograd.grad(slope, output, v, retain_graph=True)[0],
        ]

    products = asked()
    before = [product() for product in products]
    loss.scale, loss.smoothing, loss.anchor = 1.9, 0.5, 0.1
    for product, known, after in zip(products, before, asked(), strict=True):
        assert torch.equal(product(), known) and not torch.allclose(after(), known)


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("over", ["frame", "utterance"])
def test_the_fisher_matrix_is_of_mmi(name: str, over: str) -> None:
    loss = CRITERIA[name].build(fisher=over, smoothing=0.3, anchor=0.2)
    output = OUTPUT.clone().requires_grad_()
    mmi = twin_of(CRITERIA["MMI"], CRITERIA["MMI"].build(), output)
    (u,) = torch.autograd.grad(mmi, output)
    v = torch.randn(OUTPUT.shape, dtype=torch.float64)
    inner = (u * v).sum(-1, keepdim=True)
    inner = inner if over == "frame" else inner.sum(1, keepdim=True)
    torch.testing.assert_close(loss.fisher(OUTPUT, targets(loss))(v), u * inner, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("over", ["frame", "utterance"])
def test_the_fisher_diagonal_is_that_of_the_fisher_matrix(name: str, over: str) -> None:
    loss = CRITERIA[name].build(fisher=over, smoothing=0.3, anchor=0.2)
    objective = Objective(network(), loss, [(features(), targets(loss))])
    theta = objective.space.point()
    exact = dense.matrix_of(objective.curvature(theta, Curvature.EMPIRICAL_FISHER)).diagonal()
    found = objective.fisher_diagonal(theta, draws=600)
    torch.testing.assert_close(found, exact, rtol=0.25, atol=1e-9)


@pytest.mark.parametrize("name", ["MMI", "sMBR"])
def test_the_fisher_diagonal_of_utterances_is_exact_for_one_in_each_micro_batch(name: str) -> None:
    loss = CRITERIA[name].build(fisher="utterance")
    objective = Objective(network(), loss, [(features()[b : b + 1], targets(loss)[b : b + 1]) for b in range(2)])
    theta = objective.space.point()
    exact = dense.matrix_of(objective.curvature(theta, Curvature.EMPIRICAL_FISHER)).diagonal()
    torch.testing.assert_close(objective.fisher_diagonal(theta, 1), exact, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", CRITERIA)
def test_upstream_gradients_and_a_second_backward_are_respected(name: str) -> None:
    loss = CRITERIA[name].build()
    output = OUTPUT.clone().requires_grad_()
    value = loss(output, targets(loss))
    (once,) = torch.autograd.grad(value, output, retain_graph=True)
    (again,) = torch.autograd.grad(-3.0 * value, output)
    assert torch.equal(again, -3.0 * once)


@pytest.mark.parametrize("name", CRITERIA)
def test_threads_and_single_precision(name: str) -> None:
    loss, threaded = CRITERIA[name].build(), CRITERIA[name].build(jobs=2)
    given = targets(loss)
    results = []
    for one, output in ((loss, OUTPUT), (threaded, OUTPUT), (loss, OUTPUT.float())):
        leaf = output.clone().requires_grad_()
        value = one(leaf, given)
        (gradient,) = torch.autograd.grad(value, leaf)
        product = one.curvature(leaf, given)(torch.ones_like(leaf).cumsum(1))
        results.append((value.detach(), gradient, product))
    for found, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(found, expected)
    for found, expected in zip(results[2], results[0], strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_reference_alone_loses_nothing() -> None:
    """A lattice of the reference's path: MMI is log 1, every path has all right."""
    _, reference, _ = UTTERANCES[0]
    arcs = [(t, t + 1, int(reference.pdf[t])) for t in range(6)]
    chain = Lattice.from_arcs(
        arcs, final={6: reference.weight}, phone=reference.phone, begins=reference.begins, weight=np.zeros(6)
    )
    for name in CRITERIA:
        loss = CRITERIA[name].build()
        output = OUTPUT[:1].clone().requires_grad_()
        value = loss(output, [loss.target(chain, reference)])
        right = twin.worths(chain, reference, "frame", CRITERIA[name].silence, CRITERIA[name].one_class)
        assert float(value.detach()) == pytest.approx(-float(right) * getattr(loss, "boost", 0.0), abs=1e-6)
        (gradient,) = torch.autograd.grad(value, output)
        assert float(gradient.abs().max()) < 1e-12


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["MMI", "sMBR", "MPE"])
def test_a_numerical_failure_stays_visible_in_its_utterance(name: str, bad: float) -> None:
    """-inf for all pdfs of a frame: there is no path."""
    broken = OUTPUT.clone()
    broken[0, 2] = bad
    for kind in OutputCurvature:
        loss = CRITERIA[name].build(curvature=kind)
        given = targets(loss)
        output = broken.clone().requires_grad_()
        value = loss(output, given)
        assert value.isnan()
        (gradient,) = torch.autograd.grad(value, output)
        products = [matrix(broken, given)(OUTPUT) for matrix in (loss.curvature, loss.fisher)]
        for found in (gradient, *products):
            assert found[0, :6].isnan().all()
            assert not found[0, 6:].any()
            assert found[1].isfinite().all() and found[1, :4].any()
        with torch.no_grad():
            assert loss(output, given).isnan()


def test_padding_may_hold_anything() -> None:
    broken = OUTPUT.clone()
    broken[0, 6:], broken[1, 4:] = math.nan, math.inf
    for name in CRITERIA:
        loss = CRITERIA[name].build(smoothing=0.1, anchor=0.1)
        given = targets(loss)
        output = broken.clone().requires_grad_()
        value = loss(output, given)
        assert torch.equal(value, loss(OUTPUT.clone().requires_grad_(), given))
        (gradient,) = torch.autograd.grad(value, output)
        assert gradient.isfinite().all()
        assert loss.curvature(broken, given)(OUTPUT).isfinite().all()


@pytest.mark.parametrize("listed", [1, 3, C])
def test_a_model_that_is_its_own_teacher_has_no_divergence(listed: int) -> None:
    top = torch.softmax(OUTPUT[0, :6], -1).topk(listed, -1)
    loss = SMBR(PRIOR, scale=1.0, smoothing=1.0, anchor=2.0)
    lattice, reference, _ = UTTERANCES[0]
    target = loss.target(lattice, reference, teacher=(top.indices.int().numpy(), top.values.numpy()))
    output = OUTPUT[:1].clone().requires_grad_()
    value = loss(output, [target])
    entropy = nn.functional.cross_entropy(output[0, :6], torch.from_numpy(reference.pdf).long(), reduction="sum")
    torch.testing.assert_close(value, entropy, rtol=0, atol=1e-13)
    (gradient,), (wanted,) = (torch.autograd.grad(x, output) for x in (value, entropy))
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-14)


def network() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, C)).double()


def features() -> Tensor:
    return torch.randn(2, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("name", CRITERIA)
def test_an_objective_differentiates_and_linearises_it(name: str) -> None:
    loss = CRITERIA[name].build(curvature=OutputCurvature.LATTICE, smoothing=0.1)
    data = [(features(), targets(loss))]
    model = network()
    objective = Objective(model, loss, data)
    assert objective.frames == sum(FRAMES)
    theta = objective.space.point()
    value, gradient = objective.value_and_grad(theta)
    assert value == pytest.approx(objective.value(theta), rel=1e-12)
    v = torch.randn(len(theta), dtype=torch.float64)
    step = 1e-5
    ahead, behind = (objective.value(theta + s * v) for s in (step, -step))
    assert (ahead - behind) / (2 * step) == pytest.approx(float(gradient @ v), rel=1e-6, abs=1e-9)
    G, H = objective.curvatures(theta, (Curvature.GAUSS_NEWTON, Curvature.HESSIAN))
    torch.testing.assert_close(G @ v, dense.gauss_newton(model, loss, data, theta) @ v, rtol=1e-8, atol=1e-10)
    ahead, behind = (objective.value_and_grad(theta + s * v)[1] for s in (step, -step))
    torch.testing.assert_close(H @ v, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-8)


class Undeclared(SMBR):
    """Says that its curvature is symmetric."""

    symmetric = True

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "symmetric":
            super().__setattr__(name, value)


def test_only_a_loss_that_says_so_may_have_the_printed_curvature() -> None:
    printed = {"curvature": OutputCurvature.PRINTED, "scale": 0.7}
    for loss in (SMBR(PRIOR, **printed), MMI(PRIOR, **printed)):
        assert loss.symmetric is isinstance(loss, MMI)
        operator = Objective(network(), loss, [(features(), targets(loss))]).curvature(network_point())
        assert (operator @ network_point()).isfinite().all()
    undeclared = Undeclared(PRIOR, **printed)
    with pytest.raises(ValueError, match="GAUSS_NEWTON curvature is not symmetric"):
        Objective(network(), undeclared, [(features(), targets(undeclared))]).curvature(network_point())


def network_point() -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in network().parameters()])


@pytest.mark.parametrize("name", CRITERIA)
def test_descent_improves_the_expected_accuracy(name: str) -> None:
    """By plain gradient descent, step by step, and a good part of the way to the best path of the lattice."""
    criterion = CRITERIA[name]
    loss = criterion.build()
    given, model = targets(loss), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02 if criterion.loss is MMI else 0.5)
    values = []
    for _ in range(150):
        optimizer.zero_grad()
        value = loss(model(features()), given)
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    assert all(later < earlier for earlier, later in pairwise(values))
    best = sum(
        u.most - float(twin.worths(lattice, reference, criterion.kind, criterion.silence, criterion.one_class).max())
        for u, (lattice, reference, _) in zip(given, UTTERANCES, strict=True)
        if criterion.loss is not MMI
    )
    assert values[-1] - best < 0.9 * (values[0] - best)


def test_targets_and_losses_survive_pickling_and_describe_themselves() -> None:
    for name in CRITERIA:
        loss = CRITERIA[name].build(smoothing=0.1)
        given = targets(loss)
        again = pickle.loads(pickle.dumps((loss, given)))
        assert float(again[0](OUTPUT, again[1])) == float(loss(OUTPUT, given))
        assert len(given[0]) == 6 and float(loss.weight(given)) == 10
        assert "scale=0.7, smoothing=0.1" in repr(loss) and torch.equal(loss.state_dict()["log_prior"], PRIOR)
    assert repr(MMI(PRIOR, scale=1.0, boost=0.1)) != repr(MMI(PRIOR, scale=1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, "scale=0.0 must be positive"),
        ({"scale": math.nan}, "scale=nan must be positive"),
        ({"smoothing": 1.5}, "smoothing=1.5 must be a share"),
        ({"anchor": -1.0}, "anchor=-1.0 must not be negative"),
        ({"curvature": "lattice"}, "curvature='lattice': give an OutputCurvature"),
        ({"fisher": "phone"}, "fisher='phone' must be"),
        ({"jobs": 0}, "jobs=0"),
        ({"log_prior": torch.tensor([0.0, -math.inf])}, "1 entries not finite: floor the prior"),
    ],
)
@pytest.mark.parametrize("cls", [MMI, MPE, SMBR])
def test_bad_options_are_refused(cls: type[SequenceLoss], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**{"log_prior": PRIOR, "scale": 1.0, **options})


def test_bad_options_of_one_loss_are_refused() -> None:
    with pytest.raises(ValueError, match=r"boost=-0\.5"):
        MMI(PRIOR, scale=1.0, boost=-0.5)
    with pytest.raises(ValueError, match="accuracy='word' must be"):
        MPE(PRIOR, scale=1.0, accuracy="word")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 7, 4), r"output must be \[B, T, 5\]"),
        ((1, 7, C), "target has 2 utterances, output has 1"),
        ((2, 5, C), "a lattice of 6 frames, output only 5"),
    ],
)
def test_outputs_and_targets_must_fit(shape: tuple[int, ...], message: str) -> None:
    loss = CRITERIA["sMBR"].build()
    for function in (loss, loss.curvature, loss.fisher):
        with pytest.raises(ValueError, match=message):
            function(torch.zeros(shape), targets(loss))


def test_targets_of_parts_that_do_not_fit_are_refused() -> None:
    lattice, reference, (pdfs, q) = UTTERANCES[0]
    shorter = UTTERANCES[1][1]
    for name in CRITERIA:
        loss = CRITERIA[name].build()
        with pytest.raises(ValueError, match="reference has 4 frames, the lattice 6"):
            loss.target(lattice, shorter)
        with pytest.raises(ValueError, match="emits pdf 5, but log_prior has 5"):
            loss.target(lattice, replace(reference, pdf=np.full(6, 5, np.int32)))
        with pytest.raises(ValueError, match="emits pdf 7, but log_prior has 5"):
            loss.target(replace(lattice, pdf=lattice.pdf + np.int32(7) * (lattice.pdf == 0)), reference)
        with pytest.raises(ValueError, match="emits pdf 9, but log_prior has 5"):
            loss.target(lattice, reference, teacher=(pdfs + np.int32(9) * (pdfs == 0), q))
        with pytest.raises(ValueError, match=r"at most 1 in every frame; frame 3 sums to 1\.44: give them as"):
            loss.target(lattice, reference, teacher=(pdfs, q * np.where(np.arange(6) == 3, 2.0, 1.0)[:, None]))
        with pytest.raises(ValueError, match="teacher lists a pdf twice in a frame"):
            loss.target(lattice, reference, teacher=(pdfs[:, [0, 1, 0]], q))
        everything = np.tile(np.arange(C, dtype=np.int32), (6, 1))
        with pytest.raises(ValueError, match=r"teacher lists all 5 pdfs, but leaves 0\.1 of a frame to others"):
            loss.target(lattice, reference, teacher=(everything, np.full((6, C), 0.18)))
        with pytest.raises(ValueError, match=r"teacher must be pdfs and probabilities \[6, K\], not \[5, 3\]"):
            loss.target(lattice, reference, teacher=(pdfs[:5], q[:5]))
        with pytest.raises(ValueError, match="must not be negative"):
            loss.target(lattice, reference, teacher=(pdfs, np.stack([q[:, 0] + 1, q[:, 1] - 1, q[:, 2]], 1)))
    with pytest.raises(ValueError, match=r"value has shape \(3,\)"):
        SequenceTarget(lattice, reference, np.zeros(3, np.float32))


def test_a_target_of_another_criterion_is_refused() -> None:
    smbr, mmi = CRITERIA["sMBR"].build(), CRITERIA["MMI"].build(anchor=0.5)
    with pytest.raises(ValueError, match="target has no accuracies: make it with the target of SMBR"):
        smbr(OUTPUT, targets(mmi))
    bare = [mmi.target(lattice, reference) for lattice, reference, _ in UTTERANCES]
    with pytest.raises(ValueError, match=r"anchor=0\.5 needs a teacher"):
        mmi(OUTPUT, bare)
