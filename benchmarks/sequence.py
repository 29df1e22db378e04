"""The paper's table: sequence training by every optimiser, each architecture from its own cross-entropy network.

    python benchmarks/sequence.py an4 data=PATH/an4_mfcc --networks tdnn lstm [--criterion mpe]
        [--sequence criterion.smoothing=0.02 ...] [--work exp/sequence] [--json FILE]

For each network: training by cross-entropy, its lattices, and from there every method with every setting of its grid
(``GRIDS``; `--methods` chooses). A setting is chosen by its errors on dev, with the decoding weights that are best for
it; test is read for the chosen one. `OPTION=VALUE` goes to the recipe, as in ``quadric train``; those after
`--sequence`, without their ``sequence.``, to the sequence trainings alone.

Where the best learning rate of SGD or Adam is the lowest or the highest of its grid, the grid grows beyond it. A
training that diverges is worse than any other.

Columns: updates and seconds to the parameters that were kept and to the end; iterations of conjugate gradients an
update; the criterion on dev (sequence accuracy for MPE and sMBR); word error rate on dev and on test; and, of
second-order methods, the difference on test to the one of SGD and Adam that is better on dev, with its 95 % interval of
a paired bootstrap over speakers (over the utterances of a single one) and the probability of an improvement.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from common import Table
from quadric.cli import make_speech_job
from quadric.speech import scoring
from quadric.speech.scoring import Comparison, Score
from quadric.train import checkpoint
from quadric.train.console import bar
from quadric.train.finished import scores
from quadric.train.metrics import MetricsLog
from quadric.train.pipeline import run
from quadric.train.trainer import Diverged

Grid = Mapping[str, Sequence[object]]

GRIDS: dict[str, Grid] = {
    "sgd": {"lr": (3e-1, 1.0, 3.0)},
    "adam": {"lr": (3e-4, 1e-3, 3e-3)},
    "natural_gradient": {"gradient_frames": (50_000,), "iterations": (8,)},
    "hessian_free": {"gradient_frames": (50_000,), "damping": (0.1,)},
    "nghf": {"gradient_frames": (50_000, 100_000), "iterations": (8,), "candidates": ("backwards",)},
}
"""Of every method the options that are searched, and the values that are tried."""

_FIRST_ORDER = ("sgd", "adam")

MOST = 6
"""Learning rates that are tried at most."""


@dataclass(frozen=True)
class Trained:
    """One training and what it reached.

    Attributes:
        setting: of its grid.
        folder: of the training.
        scores: on dev and test.
        log: its records.
        kept: the record of the parameters that were kept.
    """

    setting: Mapping[str, object]
    folder: Path
    scores: Mapping[str, Score]
    log: Sequence[Mapping[str, Any]]
    kept: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path, setting: Mapping[str, object]) -> Trained:
        folder = folder.resolve()
        log = MetricsLog(folder / "metrics.jsonl").records()
        return cls(setting, folder, scores(folder / "decoded"), log, checkpoint.load(folder / "model.pt"))

    @property
    def errors(self) -> int:
        """On dev, by which a setting is chosen."""
        return self.scores["dev"].total.errors

    def row(self) -> dict[str, Any]:
        """Numbers for the table."""
        steps = [record["solver_steps"] for record in self.log if "solver_steps" in record]
        return {
            "setting": dict(self.setting),
            "updates": self.log[-1]["update"],
            "seconds": self.log[-1]["seconds"],
            "kept_updates": self.kept["update"],
            "kept_seconds": self.kept["seconds"],
            "iterations": sum(steps) / len(steps) if steps else None,
            "dev_loss": self.kept["loss"],
            "dev_accuracy": self.kept.get("accuracy"),
            **{split: score.total.line for split, score in self.scores.items()},
            "folder": str(self.folder),
        }


@dataclass(frozen=True)
class Tried:
    """A setting, and what was trained with it; None where that diverged."""

    setting: Mapping[str, object]
    trained: Trained | None

    @property
    def errors(self) -> float:
        return math.inf if self.trained is None else self.trained.errors


def main() -> None:
    chosen = _arguments()
    logging.basicConfig(level=logging.INFO if chosen.verbose else logging.WARNING)
    columns = (
        "network",
        "training",
        "setting",
        "updates",
        "seconds",
        "iterations",
        "dev accuracy",
        "dev",
        "test",
        "to SGD and Adam",
    )
    table = Table(columns, chosen.json)
    for network in chosen.networks:
        _one_network(network, chosen, table)


def _one_network(network: str, chosen: argparse.Namespace, table: Table) -> None:
    base = [f"name={chosen.recipe}-{network}", "hessian_free=none", *NETWORKS[network], *chosen.options]
    work = chosen.work / f"{chosen.recipe}-{network}"
    cross_entropy = _train(chosen, base, work, None, {}, "adamw")
    _add(table, network, "cross-entropy", cross_entropy, None)
    best: dict[str, Trained] = {}
    for method in sorted(chosen.methods, key=lambda name: name not in _FIRST_ORDER):
        tried: list[Tried] = []
        for setting in _searched(GRIDS[method], tried):
            row = {"network": network, "training": method, "tried": True}
            try:
                trained = _train(chosen, base, work, method, setting, f"{chosen.criterion}_{method}")
            except Diverged as error:
                table.rows.append(row | {"setting": dict(setting), "diverged": str(error)})
                tried.append(Tried(setting, None))
            else:
                table.rows.append(row | trained.row())
                tried.append(Tried(setting, trained))
        best[method] = _best([each.trained for each in tried if each.trained is not None])
        rivals = [best[name] for name in _FIRST_ORDER if name in best]
        compared = _compare(_best(rivals), best[method]) if method not in _FIRST_ORDER and rivals else None
        _add(table, network, method, best[method], compared)


def _best(trained: Sequence[Trained]) -> Trained:
    return min(trained, key=lambda each: each.errors)


def _searched(grid: Grid, tried: Sequence[Tried]) -> Iterator[dict[str, object]]:
    """All settings of ``grid``; then, while the best learning rate in ``tried`` is an end of them, the next beyond."""
    for values in product(*grid.values()):
        yield dict(zip(grid, values, strict=True))
    while "lr" in grid and len(tried) < MOST:
        rates = sorted(each.setting["lr"] for each in tried)  # type: ignore[type-var]
        rate = min(tried, key=lambda each: each.errors).setting["lr"]
        if rate not in (rates[0], rates[-1]):
            return
        beyond = rates[-1] ** 2 / rates[-2] if rate == rates[-1] else rates[0] ** 2 / rates[1]  # type: ignore[operator]
        yield {"lr": float(f"{beyond:.1g}")}


def _recurrent(units: int) -> list[str]:
    return [f"network.sizes=[{units}]", f"network.feed_forward=[{units}]"]


NETWORKS: dict[str, list[str]] = {
    "dnn": ["network.kind=dnn", "network.sizes=[384,384,384,384]"],
    "tdnn": [],
    "rnn": ["network.kind=rnn", *_recurrent(256)],
    "lstm": ["network.kind=lstm", *_recurrent(128)],
}
"""Sizes for two cores, the TDNN's those of the recipe; `network=paper-lstm` and the like are the paper's."""


def _train(
    chosen: argparse.Namespace,
    base: Sequence[str],
    work: Path,
    method: str | None,
    setting: Mapping[str, object],
    name: str,
) -> Trained:
    options = list(base)
    if method is not None:
        others = [other for other in GRIDS if other != method]
        options += [f"sequence.criterion.kind={chosen.criterion}", *(f"sequence.{other}=none" for other in others)]
        if method not in _FIRST_ORDER:
            options += [
                f"sequence.{method}.{option}={getattr(chosen, option)}" for option in ("curvature_frames", "epochs")
            ]
        options += [f"sequence.{method}.{key}={value}" for key, value in setting.items()]
        options += [f"sequence.{option}" for option in chosen.sequence]
    run(make_speech_job(chosen.recipe, options), work, progress=bar)
    return Trained.of(work / name, setting)


def _add(table: Table, network: str, training: str, trained: Trained, comparison: Comparison | None) -> None:
    row = trained.row()
    compared = ""
    if comparison is not None:
        row |= {"difference": comparison.difference, "low": comparison.low, "high": comparison.high,
                "probability": comparison.probability}  # fmt: skip
        interval = f"[{comparison.low:+.2f}, {comparison.high:+.2f}]"
        compared = f"{comparison.difference:+.2f} {interval}, {comparison.probability:.3f}"
    accuracy = row["dev_accuracy"]
    cells = (
        network,
        training,
        ", ".join(f"{key} {value}" for key, value in trained.setting.items()),
        f"{row['kept_updates']:,} of {row['updates']:,}",
        f"{row['kept_seconds']:,.0f} of {row['seconds']:,.0f}",
        "" if row["iterations"] is None else f"{row['iterations']:.1f}",
        "" if accuracy is None else f"{100 * accuracy:.2f} %",
        row["dev"],
        row["test"],
        compared,
    )
    table.add({"network": network, "training": training, **row}, cells)


def _compare(first: Trained, second: Trained) -> Comparison:
    """On test, which chose neither; speakers resampled, or the utterances of a single one."""
    one, other = first.scores["test"], second.scores["test"]
    return scoring.paired_bootstrap(one, other, by="speaker" if len(one.per_speaker) > 1 else "utterance")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("options", nargs="*", metavar="OPTION=VALUE")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--methods", nargs="+", choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--criterion", choices=["mmi", "mpe", "smbr"], default="mpe")
    parser.add_argument(
        "--sequence",
        nargs="+",
        default=[],
        metavar="OPTION=VALUE",
        help="of sequence trainings: criterion.smoothing=0.02",
    )
    parser.add_argument("--curvature-frames", type=int, default=6_000, help="of second-order updates")
    parser.add_argument("--epochs", type=float, default=4.0, help="of second-order trainings")
    parser.add_argument("--work", type=Path, default=Path("exp/sequence"), help="folder of working folders")
    parser.add_argument("--json", type=Path, help="file for the rows, those of settings that were not chosen as well")
    parser.add_argument("--verbose", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
