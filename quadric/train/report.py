"""The result of a job as one self-contained HTML page: tables, curves, alignments, and everything to repeat it.

The page holds no time stamps and needs no other file: the same report gives the same bytes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, TypeGuard

import jinja2
from markupsafe import Markup

from quadric.files import new_file
from quadric.speech.scoring import Comparison, Errors, Score, operation, paired_bootstrap
from quadric.train.charts import Line, Scale, colour, line_chart, marker
from quadric.train.stages import plain

_SAMPLES = 10_000
_WORK: tuple[str, ...] = ("gradient", "products", "evaluation", "preconditioner", "solver", "communication")
_RATIOS = (-1.0, 2.5)


@dataclass(frozen=True)
class Run:
    """One training run and what it reached.

    Attributes:
        name: of the system, unlike those of the other runs.
        curves: the records of its log. Of their entries the page shows, against ``update`` and ``seconds``,
            ``objective`` (on the training data), ``dev_loss`` and ``dev_accuracy``, and of second-order steps
            ``damping``, ``solver_steps``, ``ratio``, ``outcome``, the frames of the samples and the seconds of each
            kind of work.
        scores: name of a test set -> the system's score on it.
        updates: of the parameters.
        seconds: of training.
        parameters: of the model; ``None`` where it has no such number.
        notes: anything to say about the run.
        criterion: what its losses and accuracies are of; runs of one criterion share a chart.
    """

    name: str
    curves: Sequence[Mapping[str, Any]]
    scores: Mapping[str, Score]
    updates: int
    seconds: float
    parameters: int | None = None
    notes: str = ""
    criterion: str = "cross-entropy"


@dataclass(frozen=True)
class Sweep:
    """Errors over a grid of decoding options.

    Attributes:
        name: of the system and the set.
        errors: (language model weight, insertion penalty) -> errors.
        chosen: the pair that was used; the first with the fewest errors if ``None``.
    """

    name: str
    errors: Mapping[tuple[float, float], Errors]
    chosen: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not self.errors:
            raise ValueError(f"errors: the sweep {self.name!r} holds none; leave it out of the report")
        if self.chosen is not None and self.chosen not in self.errors:
            raise ValueError(f"chosen={self.chosen}: not a point of the sweep {self.name!r}; choose one of its keys")

    @property
    def best(self) -> tuple[float, float]:
        """The pair that was used."""
        return self.chosen or min(self.errors, key=lambda pair: (self.errors[pair].errors, pair))

    @property
    def weights(self) -> list[float]:
        """The rows of the grid."""
        return sorted({weight for weight, _ in self.errors})

    @property
    def penalties(self) -> list[float]:
        """Its columns."""
        return sorted({penalty for _, penalty in self.errors})

    @property
    def at_the_edge(self) -> bool:
        """Whether a wider grid might hold a better pair."""
        axes = zip(self.best, (self.weights, self.penalties), strict=True)
        return any(len(values) > 1 and value in (values[0], values[-1]) for value, values in axes)


@dataclass(frozen=True)
class Environment:
    """Where and from what the results came.

    Attributes:
        versions: of Python, torch, this package and the others that matter.
        machine: such as cores and memory.
        seeds: what was seeded -> the seed.
    """

    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, object] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What the page tells.

    Attributes:
        title: of the page.
        runs: at least one; the first is the baseline the others are compared with.
        summary: a paragraph under the title.
        recipe: all options, nested as they are; records may be dataclasses.
        environment: versions, machine, seeds.
        sweeps: of decoding options.
        data: what is known of the sets, such as how many utterances were left out, and why.
        alignment: what is known of the alignment's quality, such as its frames or agreement with a reference.
        sequence: what is known of the sets of sequence training, such as how many utterances were left out, and why.
        worst: utterances to show for each run and set.
    """

    title: str
    runs: Sequence[Run]
    summary: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    environment: Environment = field(default_factory=Environment)
    sweeps: Sequence[Sweep] = ()
    data: Mapping[str, object] = field(default_factory=dict)
    alignment: Mapping[str, object] = field(default_factory=dict)
    sequence: Mapping[str, object] = field(default_factory=dict)
    worst: int = 10

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("runs: there are none to report; pass at least one Run")
        twice = [name for name, n in Counter(run.name for run in self.runs).items() if n > 1]
        if twice:
            raise ValueError(f"runs: the name {twice[0]!r} occurs more than once; give each run its own")
        if self.worst < 0:
            raise ValueError(f"worst={self.worst}: must be 0 or more utterances")

    @property
    def sets(self) -> list[str]:
        """Names of all sets, in the order the runs name them."""
        return list(dict.fromkeys(name for run in self.runs for name in run.scores))


def write_report(report: Report, path: str | Path) -> None:
    """Writes the page whole, or not at all."""
    page = render(report)
    with new_file(Path(path)) as temporary:
        temporary.write_text(page, encoding="utf-8")


def render(report: Report) -> str:
    """The page as text."""
    pages = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    pages.filters |= {"duration": duration, "number": number, "signed": signed, "operation": operation}
    template = pages.from_string(resources.files(__package__).joinpath("report.html.jinja").read_text("utf-8"))
    return template.render(
        report=report,
        legend={run.name: (colour(i), marker(i)) for i, run in enumerate(report.runs)},
        best={name: _best(report, name) for name in report.sets},
        criteria={run.name: run.criterion for run in report.runs},
        reached={run.name: at for run in report.runs if (at := _reached(run))},
        comparisons=_comparisons(report),
        curves=_curves(report),
        diagnostics=_diagnostics(report),
        steps={run.name: ends for run in report.runs if (ends := _steps(run))},
        speakers={name: people for name in report.sets if (people := _speakers(report, name))},
        speaker_rates=_speaker_rates,
        heat=heat,
        samples=_SAMPLES,
        recipe=_tree(plain(dict(report.recipe))),
    )


def duration(seconds: float) -> str:
    """A time span to be read by people.

    >>> duration(7.25), duration(95), duration(5040)
    ('7.2 s', '1 min 35 s', '1 h 24 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def number(value: object) -> str:
    """A value as tables show it.

    >>> number(1234567), number(0.123456), number(1e-7), number("SIL"), number(None)
    ('1,234,567', '0.1235', '1e-07', 'SIL', '–')
    """
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def signed(points: float) -> str:
    """A difference with its sign.

    >>> signed(1.5), signed(0.0)
    ('+1.50', '+0.00')
    """
    return f"{points:+.2f}".replace("-", "\N{MINUS SIGN}")


def heat(value: float, values: Sequence[float]) -> float:
    """Where ``value`` lies between the least (0) and the greatest (1) of ``values``."""
    finite = [v for v in values if math.isfinite(v)]
    if not math.isfinite(value) or not finite or min(finite) == max(finite):
        return 0.0
    return round((value - min(finite)) / (max(finite) - min(finite)), 3)


def _best(report: Report, name: str) -> Run:
    """The run with the fewest errors on a set."""
    return min((run for run in report.runs if name in run.scores), key=lambda run: run.scores[name].total.rate)


def _speakers(report: Report, name: str) -> list[str]:
    return sorted({speaker for run in report.runs if name in run.scores for speaker in run.scores[name].per_speaker})


def _speaker_rates(report: Report, name: str) -> list[float]:
    """Of all runs."""
    scores = [run.scores[name] for run in report.runs if name in run.scores]
    return [errors.rate for score in scores for errors in score.per_speaker.values()]


def _tree(value: Any) -> list[tuple[str, Any]]:
    """Options as (name, text) or (name, branches), from what JSON can hold."""
    items = value.items() if isinstance(value, dict) else enumerate(value, start=1)
    return [(str(key), _tree(item) if _branches(item) else _leaf(item)) for key, item in items]


def _branches(item: Any) -> bool:
    nested = isinstance(item, list) and any(isinstance(part, (dict, list)) for part in item)
    return bool(item) and (nested or isinstance(item, dict))


def _leaf(item: Any) -> str:
    if isinstance(item, (list, dict)):
        return ", ".join(map(str, item)) or "none"
    return "none" if item is None or item == "" else str(item)


def _comparisons(report: Report) -> list[tuple[str, str, Comparison | None, str]]:
    """(set, run, comparison with the first run, what was resampled or why there is none)."""
    baseline, *others = report.runs
    rows: list[tuple[str, str, Comparison | None, str]] = []
    for name, first in baseline.scores.items():
        by = partial(paired_bootstrap, by="speaker" if len(first.per_speaker) > 1 else "utterance")
        unit = "speakers" if len(first.per_speaker) > 1 else "utterances"
        for run in others:
            if name in run.scores:
                try:
                    rows.append((name, run.name, by(first, run.scores[name], samples=_SAMPLES), unit))
                except ValueError as error:
                    rows.append((name, run.name, None, str(error)))
    return rows


def _points(run: Run, x: str, y: str) -> list[tuple[float, float]]:
    """Where a run's log has both numbers."""
    pairs = ((record.get(x), record.get(y)) for record in run.curves)
    return [(a, b) for a, b in pairs if _is_number(a) and _is_number(b)]


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _line(
    series: int, run: Run, x: str, y: str, *, scale: tuple[float, float] = (1.0, 1.0), dashed: bool = False
) -> Line:
    points = _points(run, x, y)
    return Line(series, [a * scale[0] for a, _ in points], [b * scale[1] for _, b in points], dashed)


def _curves(report: Report) -> list[Markup]:
    """Loss and accuracy, each against time and against updates, of each criterion."""
    longest = max((x for run in report.runs for x, _ in _points(run, "seconds", "dev_loss")), default=0.0)
    unit, share = (
        ("hours", 3600.0) if longest > 3 * 3600 else ("minutes", 60.0) if longest > 3 * 60 else ("seconds", 1.0)
    )
    axes: tuple[tuple[str, str, float, Scale], ...] = (
        ("seconds", f"training time ({unit})", 1 / share, "linear"),
        ("update", "updates", 1.0, "counts"),
    )
    charts = []
    for criterion in dict.fromkeys(run.criterion for run in report.runs):
        # A run keeps its number, and with it its colour.
        runs = [(i, run) for i, run in enumerate(report.runs) if run.criterion == criterion]
        ceiling = (-math.inf, _ceiling([run for _, run in runs]))
        of = "frame accuracy" if criterion == "cross-entropy" else f"accuracy, {criterion}"
        for x, label, factor, scale in axes:
            dev = [_line(i, run, x, "dev_loss", scale=(factor, 1.0)) for i, run in runs]
            train = [_line(i, run, x, "objective", scale=(factor, 1.0), dashed=True) for i, run in runs]
            charts.append(_chart(f"Loss per frame, {criterion}", train + dev, label, x_scale=scale, y_range=ceiling))
        for x, label, factor, scale in axes:
            right = [_line(i, run, x, "dev_accuracy", scale=(factor, 100.0)) for i, run in runs]
            charts.append(_chart(f"Held-out {of} (%)", right, label, x_scale=scale))
    return [chart for chart in charts if chart]


def _ceiling(runs: Sequence[Run]) -> float:
    """Half way from the lowest held-out loss up to the highest at a start: above, curves say nothing of their end."""
    losses = [[y for _, y in points] for run in runs if (points := _points(run, "update", "dev_loss"))]
    if not losses:
        return math.inf
    start, lowest = max(run[0] for run in losses), min(min(run) for run in losses)
    return (start + lowest) / 2 if lowest < start else start + 0.1 * abs(start)


def _diagnostics(report: Report) -> list[Markup]:
    """What second-order steps did, where there were any."""
    shown: tuple[tuple[str, str, Scale, tuple[float, float] | None], ...] = (
        ("damping", "Damping λ", "log", None),
        ("solver_steps", "CG steps per update", "linear", None),
        ("ratio", "Reduction ratio: actual over predicted", "linear", _RATIOS),
        ("gradient_frames", "Frames of the gradient's sample", "linear", None),
        ("curvature_frames", "Frames of the curvature's sample", "linear", None),
        *((f"{work}_seconds", f"Seconds of an update: {work}", "linear", None) for work in _WORK),
    )
    charts = []
    for key, label, scale, limits in shown:
        lines = [_line(i, run, "update", key) for i, run in enumerate(report.runs)]
        charts.append(_chart(label, lines, "updates", y_scale=scale, y_range=limits))
    return [chart for chart in charts if chart]


def _chart(label: str, lines: Sequence[Line], x_label: str, **options: Any) -> Markup | None:
    lines = [line for line in lines if line.x]
    if not lines:
        return None
    return Markup(line_chart(lines, name=f"{label} against {x_label}", x_label=x_label, y_label=label, **options))


def _reached(run: Run) -> Mapping[str, Any] | None:
    """The record of the lowest held-out loss."""
    judged = [
        record for record in run.curves if _is_number(record.get("update")) and _is_number(record.get("dev_loss"))
    ]
    return min(judged, key=lambda record: record["dev_loss"], default=None)


def _steps(run: Run) -> dict[str, int]:
    """How the run's second-order steps ended, most frequent first."""
    ends = Counter(str(record["outcome"]) for record in run.curves if "outcome" in record)
    return dict(ends.most_common())
