from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quadric.train.metrics import MetricsLog

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text().filter(lambda text: text not in ("NaN", "Infinity", "-Infinity")),
)
RECORDS = st.lists(st.dictionaries(st.text(min_size=1), VALUES, max_size=4), max_size=6)


@pytest.fixture
def log(tmp_path: Path) -> MetricsLog:
    return MetricsLog(tmp_path / "run" / "metrics.jsonl")


def fill(log: MetricsLog, updates: range) -> None:
    for update in updates:
        log.append({"update": update, "epoch": update / 4, "loss": 1 / (update + 1)})


@given(RECORDS)
def test_what_is_read_is_what_was_written(tmp_path_factory: pytest.TempPathFactory, records: list[dict]) -> None:
    log = MetricsLog(tmp_path_factory.mktemp("log") / "metrics.jsonl")
    numbered = [{**record, "update": i} for i, record in enumerate(records)]
    for record in numbered:
        log.append(record)
    assert log.records() == numbered
    assert MetricsLog(log.path).records() == numbered


def test_no_file_holds_no_records(log: MetricsLog) -> None:
    assert log.records() == []
    log.truncate_after(3)
    assert log.records() == []


def test_each_line_is_on_the_disk_at_once(log: MetricsLog) -> None:
    log.append({"update": 0})
    before = log.path.read_bytes()
    log.append({"update": 1})
    assert log.path.read_bytes() == before + b'{"update": 1}\n'


def test_numpy_becomes_plain(log: MetricsLog) -> None:
    log.append({"update": np.int64(3), "loss": np.float32(0.5), "ok": np.bool_(True), "name": np.str_("x")})
    (record,) = log.records()
    assert record == {"update": 3, "loss": 0.5, "ok": True, "name": "x"}
    assert [type(value) for value in record.values()] == [int, float, bool, str]


def test_floats_that_json_lacks_are_strings_in_the_file_and_floats_outside(log: MetricsLog) -> None:
    log.append({"update": 0, "a": math.inf, "b": -math.inf, "c": math.nan, "d": np.float32("nan")})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    line = json.loads(log.path.read_text(), parse_constant=refuse)
    assert line == {"update": 0, "a": "Infinity", "b": "-Infinity", "c": "NaN", "d": "NaN"}
    (record,) = log.records()
    assert (record["a"], record["b"]) == (math.inf, -math.inf)
    assert math.isnan(record["c"]) and math.isnan(record["d"])


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_last_line_cut_short_is_as_good_as_never_written(log: MetricsLog, cut: int) -> None:
    fill(log, range(3))
    whole = log.path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    log.path.write_bytes(whole[: -min(cut, len(last))])
    reopened = MetricsLog(log.path)
    assert [record["update"] for record in reopened.records()] == [0, 1]
    fill(reopened, range(2, 3))
    assert log.path.read_bytes() == whole


@pytest.mark.parametrize("damage", [b"", b"\x00\x00", b"{", b"[1]", b'{"loss": 1}', b"\xff", b'{"update": 1.5}'])
def test_any_other_damage_is_an_error_that_names_the_line(log: MetricsLog, damage: bytes) -> None:
    fill(log, range(3))
    lines = log.path.read_bytes().split(b"\n")
    lines[1] = damage
    log.path.write_bytes(b"\n".join(lines))
    for read in (log.records, lambda: log.truncate_after(5), lambda: MetricsLog(log.path).append({"update": 9})):
        with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
            read()


@pytest.mark.parametrize("saved", [-1, 0, 3, 6, 9])
def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path: Path, saved: int) -> None:
    uninterrupted, resumed = MetricsLog(tmp_path / "a.jsonl"), MetricsLog(tmp_path / "b.jsonl")
    fill(uninterrupted, range(10))
    fill(resumed, range(8))
    resumed.path.write_bytes(resumed.path.read_bytes()[:-5])
    resumed = MetricsLog(resumed.path)
    resumed.truncate_after(saved)
    fill(resumed, range(len(resumed.records()), 10))
    assert resumed.path.read_bytes() == uninterrupted.path.read_bytes()


def test_updates_never_go_back(log: MetricsLog) -> None:
    fill(log, range(5))
    log.append({"update": 4, "again": True})
    with pytest.raises(ValueError, match=r"update=2: .* ends at update 4; .* truncate_after\(2\)"):
        MetricsLog(log.path).append({"update": 2})
    log.truncate_after(2)
    log.append({"update": 2})
    assert [record["update"] for record in log.records()] == [0, 1, 2, 2]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"loss": 1.0}, "update=None"),
        ({"update": -1}, "update=-1"),
        ({"update": True}, "update=True"),
        ({"update": 1.0}, "update=1.0"),
        ({"update": 1, "loss": torch.tensor(1.0)}, "pass .item()"),
        ({"update": 1, "losses": [1.0]}, "losses="),
        ({"update": 1, "nested": {"a": 1}}, "nested="),
        ({"update": 1, "text": "NaN"}, "stands for a float"),
        ({"update": 1, 3: 4}, "the name 3"),
    ],
)
def test_a_bad_record_is_refused_and_nothing_written(log: MetricsLog, record: dict, message: str) -> None:
    fill(log, range(1))
    before = log.path.read_bytes()
    with pytest.raises(ValueError, match=message):
        log.append(record)
    assert log.path.read_bytes() == before
