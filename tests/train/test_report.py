from __future__ import annotations

import dataclasses
import html
import math
import os
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest

pytest.importorskip("kaldialign", reason="needs the speech extra")

from quadric.speech.scoring import Errors, Score, score
from quadric.train.charts import COLOURS, Line, line_chart
from quadric.train.report import Environment, Report, Run, Sweep, render, write_report

pytestmark = pytest.mark.speech

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags nest and keeps what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list) -> None:
        values = dict(attributes)
        self.tags.add(tag)
        if "id" in values:
            self.ids.append(values["id"])
        self.targets += [values[name] for name in ("href", "src", "xlink:href") if name in values]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += f"{data} "


def scored(wrong: int, *, utterances: int = 8, speakers: int = 4) -> Score:
    """Of two words an utterance, the first is wrong in the first ``wrong`` utterances."""
    names = [f"u{i}" for i in range(utterances)]
    return score(
        {name: ["yes", "<no>"] for name in names},
        {name: ["<b>" if i < wrong else "yes", "<no>"] for i, name in enumerate(names)},
        speakers={name: f"s{i % speakers}" for i, name in enumerate(names)},
    )


def first_order(name: str, wrong: int) -> Run:
    curves = [
        {"update": u, "seconds": u * 0.5, "objective": 2.1 / (u + 1), "dev_loss": 2.5 / (u + 1), "dev_accuracy": 0.5}
        for u in range(0, 500, 50)
    ]
    return Run(name, curves, {"dev": scored(wrong), "test": scored(wrong + 1)}, 450, 225.0, 1234567, "a <i>note</i>")


def second_order() -> Run:
    steps = [
        {"update": u, "seconds": u * 9.0, "damping": 0.5**u, "solver_steps": 5 + u, "ratio": 0.9, "outcome": "accepted"}
        for u in range(1, 6)
    ]
    steps.append({"update": 6, "seconds": 54.0, "ratio": math.nan, "damping": 1.0, "outcome": "no_decrease"})
    return Run("hessian_free", steps, {"test": scored(2)}, 6, 54.0)


def full() -> Report:
    return Report(
        title="Digits & <script>alert(1)</script>",
        runs=[first_order("sgd", 3), first_order("adamw", 1), second_order()],
        summary="Two & more.",
        recipe={"network": Environment(seeds={"a": 3}), "data": Path("a/b"), "steps": [{"lr": 0.1}, 7], "none": []},
        environment=Environment({"torch": "2.13"}, {"cores": 2}, {"order": 17}),
        sweeps=[Sweep("on dev", {(w, p): Errors(100, 0, 0, int(w + 3 * p)) for w in (7.0, 8, 9) for p in (0.0, 1, 2)})],
        data={"left out: audio": 12},
        alignment={"frames": 1234567, "failed": 0},
    )


@pytest.fixture(scope="module")
def page() -> str:
    return render(full())


def test_is_well_formed_and_needs_nothing_from_outside(page: str) -> None:
    parsed = Page(page)
    assert "script" not in parsed.tags and "link" not in parsed.tags and "img" not in parsed.tags
    assert parsed.targets and all(target.startswith("#") for target in parsed.targets)
    assert {target[1:] for target in parsed.targets} <= set(parsed.ids)
    assert not re.search(r"https?:|@import|url\((?!#)", page)


def test_drawings_do_not_share_ids(page: str) -> None:
    clips = re.findall(r'<clipPath id="([^"]*)"', page)
    assert len(clips) == len(set(clips)) == page.count("<svg role=") > 5


def test_drawings_are_well_formed_and_take_the_colours_of_the_page(page: str) -> None:
    drawings = re.findall(r"<svg role=.*?</svg>", page, flags=re.DOTALL)
    for drawing in drawings:
        ElementTree.fromstring(drawing.replace("<svg ", '<svg xmlns:xlink="x" ', 1))
        assert not re.search(r"#[0-9a-f]{6}\b(?=[;\"])", drawing)
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", page))
    for scheme in page.split("prefers-color-scheme: dark")[:2]:
        assert used - {"h"} <= set(re.findall(r"--([a-z0-9-]+):", scheme))


def test_is_the_same_to_the_byte_whatever_the_settings_of_matplotlib(page: str) -> None:
    with matplotlib.rc_context({"font.size": 30, "axes.grid": False}):
        assert render(full()) == page


def test_escapes_what_it_is_given(page: str) -> None:
    assert "<script>alert" not in page and "<i>note" not in page and "<b>" not in page.split("Worst utterances")[-1]
    text = Page(page).text
    assert "Digits & <script>alert(1)</script>" in text
    assert "a <i>note</i>" in text


def test_tells_everything(page: str) -> None:
    text = " ".join(Page(page).text.split())
    for score_line in full().runs[0].scores["dev"].lines[:2]:
        assert score_line in text
    for expected in (
        "dev: lowest word error rate 6.25 % adamw",
        "1,234,567",
        "3 min 45 s",
        "Against sgd",
        "4 speakers",
        "5 accepted, 1 no decrease",
        "dev: 4 speakers",
        "torch 2.13",
        "order 17",
        "cores 2",
        "data a/b",
        "lr 0.1",
        "none none",
        "Data left out: audio 12 Alignment",
        "frames 1,234,567",
    ):
        assert expected in text


def test_curves_and_diagnostics_have_their_drawings(page: str) -> None:
    names = re.findall(r'<svg role="img" aria-label="([^"]*)"', page)
    assert names == [
        "Loss per frame, cross-entropy against training time (minutes)",
        "Loss per frame, cross-entropy against updates",
        "Held-out frame accuracy (%) against training time (minutes)",
        "Held-out frame accuracy (%) against updates",
        "Damping λ against updates",
        "CG steps per update against updates",
        "Reduction ratio: actual over predicted against updates",
    ]


def test_every_criterion_has_charts_of_its_own() -> None:
    first, *others = full().runs
    other = dataclasses.replace(first, name="after", criterion="mpe")
    page = render(dataclasses.replace(full(), runs=[first, other, *others]))
    names = re.findall(r'<svg role="img" aria-label="([^"]*)"', page)
    assert [name.split(" against ")[0] for name in names[1:8:2]] == [
        "Loss per frame, cross-entropy",
        "Held-out frame accuracy (%)",
        "Loss per frame, mpe",
        "Held-out accuracy, mpe (%)",
    ]
    rows = re.findall(r"<tr><th scope=\"row\">.*?</tr>", page.split('id="curves"')[1], flags=re.DOTALL)
    assert [("after" in row, "<td>mpe</td>" in row) for row in rows[:2]] == [(False, False), (True, True)]


def test_samples_and_times_of_a_step_have_their_drawings() -> None:
    works = ("gradient", "products", "evaluation", "preconditioner", "solver", "communication")
    steps = [
        {"update": u, "seconds": u * 9.0, "gradient_frames": 100.0 * u, "curvature_frames": 10.0 * u}
        | {f"{work}_seconds": float(u + i) for i, work in enumerate(works)}
        for u in range(1, 4)
    ]
    drawn = {
        name: drawing
        for drawing in re.findall(
            r"<svg role=.*?</svg>", render(Report("t", [Run("x", steps, {}, 3, 27.0)])), re.DOTALL
        )
        for name in re.findall(r'aria-label="([^"]*) against updates"', drawing)
    }
    expected = [f"Frames of the {of}'s sample" for of in ("gradient", "curvature")]
    expected += [f"Seconds of an update: {work}" for work in works]
    assert list(drawn) == [html.escape(name) for name in expected]
    for drawing in drawn.values():  # a curve through three points, each with its marker
        assert len(re.findall(r"<use ", drawing)) >= 3 and "var(--series-1)" in drawing
    without = [{key: value for key, value in step.items() if key != "solver_seconds"} for step in steps]
    assert "update: solver" not in render(Report("t", [Run("x", without, {}, 3, 27.0)]))


def test_the_best_system_of_each_set_is_marked(page: str) -> None:
    assert page.count('class="best"') == 2
    adamw = page.index("adamw", page.index("Results</h2>"))
    assert page.index('class="best"') > adamw


def test_worst_utterances_show_words_over_words(page: str) -> None:
    substituted = r'<span class="pair S"><span>yes</span><span>&lt;b&gt;</span><i>S</i></span>'
    assert len(re.findall(substituted, page)) == 3 + 4 + 1 + 2 + 2
    fewer = render(dataclasses.replace(full(), worst=1))
    assert len(re.findall(substituted, fewer)) == 5
    assert "Worst utterances" not in render(dataclasses.replace(full(), worst=0))


def test_a_sweep_shows_its_choice_and_warns_at_the_edge(page: str) -> None:
    assert len(re.findall(r'class="n heat chosen"[^>]*>7.00<', page)) == 1
    assert "at the edge of the grid" in page
    (sweep,) = full().sweeps
    inside = dataclasses.replace(full(), sweeps=[dataclasses.replace(sweep, chosen=(8.0, 1.0))])
    assert re.search(r'class="n heat chosen"[^>]*>11.00<', render(inside))
    assert "at the edge of the grid" not in render(inside)


def test_systems_that_cannot_be_compared_say_why() -> None:
    runs = [first_order("a", 1), dataclasses.replace(first_order("b", 1), scores={"dev": scored(1, utterances=7)})]
    assert "u7 scored by one system only" in render(Report("Unequal", runs))


def test_a_bare_run_is_enough() -> None:
    text = Page(render(Report("Bare", [Run("only", [], {}, 0, 0.0)]))).text
    assert "only" in text and "Nothing was recorded." in text
    assert "Speakers" not in text and "Against" not in text


def test_diverged_curves_are_drawn_without_warnings(recwarn: pytest.WarningsRecorder) -> None:
    curves = [{"update": u, "seconds": float(u), "dev_loss": 3.0 * 10.0**u, "damping": 0.0} for u in range(6)]
    curves += [{"update": 6, "seconds": 6.0, "dev_loss": math.nan, "ratio": -5.0}, {"update": 7, "dev_loss": math.inf}]
    Page(render(Report("Diverged", [Run("x", curves, {}, 7, 7.0)])))
    assert not recwarn.list


def test_more_runs_than_colours() -> None:
    runs = [first_order(f"run{i}", i % 3) for i in range(COLOURS + 2)]
    page = render(Report("Many", runs))
    assert len(set(re.findall(r'color: var\(--series-(\d)\)" aria-hidden="true">(.)<', page))) == COLOURS + 2


def test_writes_the_page_whole_or_not_at_all(tmp_path: Path, page: str) -> None:
    write_report(full(), tmp_path / "deep" / "report.html")
    assert (tmp_path / "deep" / "report.html").read_text(encoding="utf-8") == page
    with pytest.raises(TypeError):
        write_report(Report("Broken", [Run("x", [], {}, 0, seconds=None)]), tmp_path / "b.html")
    assert os.listdir(tmp_path) == ["deep"]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Report("t", []), "runs: there are none"),
        (lambda: Report("t", [second_order(), second_order()]), "'hessian_free' occurs more than once"),
        (lambda: Report("t", [second_order()], worst=-1), "worst=-1"),
        (lambda: Sweep("s", {}), "holds none"),
        (lambda: Sweep("s", {(1.0, 0.0): Errors()}, chosen=(2.0, 0.0)), r"chosen=\(2.0, 0.0\)"),
    ],
)
def test_misuse(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_chart_leaves_out_what_is_not_finite() -> None:
    options = {"name": "n", "x_label": "x", "y_label": "y"}
    holes = Line(0, [0.0, 1.0, 2.0, math.inf], [1.0, math.nan, 2.0, 3.0])
    assert line_chart([holes], **options) == line_chart([Line(0, [0.0, 2.0], [1.0, 2.0])], **options)
