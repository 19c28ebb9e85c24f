"""What a terminal shows of a run's rows: numbers, curves, last lines of logs in the making."""

from __future__ import annotations

import json
import math
from pathlib import Path

from capo.lab.readings import BLOCKS, POLICY_SHIFT, READINGS, Series, curve, describe, last_row

ROOT = Path(__file__).parents[2]


def test_a_curve_has_its_lowest_and_highest_blocks():
    assert curve([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], 8) == BLOCKS
    assert curve([3.0, 3.0, 3.0], 8) == BLOCKS[0] * 3
    assert curve([1.0], 8) == curve([], 8) == curve([1.0, 2.0], 0) == ""


def test_a_long_curve_is_of_means():
    values = [float(i) for i in range(1000)]
    drawn = curve(values, 8)
    assert drawn == BLOCKS
    assert curve([*values, 1e9], 8)[-1] == BLOCKS[-1]
    assert set(curve([*values, 1e9], 8)[:-1]) == {BLOCKS[0]}


def test_a_curve_of_magnitudes_shows_decades():
    values = [10.0**-k for k in range(8)]
    assert curve(values, 8, log=True) == BLOCKS[::-1]
    assert curve([0.0, 1e-3, 1e-2], 3, log=True)[0] == BLOCKS[0]


def test_readings_take_the_first_key_that_is_a_number():
    row = {"capo/trust/measured_policy_shift": math.nan, "capo/monitor/measured_policy_shift": 2e-3}
    assert POLICY_SHIFT.of(row) == 2e-3
    assert POLICY_SHIFT.text(2e-3) == "2.0e-03 nats a token"
    series = Series()
    series.add(row)
    series.add({"reward": None})
    assert {each.name: list(values) for each, values in series.values.items()} == {
        "policy shift": [2e-3]
    }


def test_every_key_is_in_the_glossary():
    glossary = (ROOT / "docs" / "metrics.md").read_text()
    for reading in READINGS:
        for key in reading.keys:
            assert f"| `{key}` |" in glossary


def test_a_step_on_a_line():
    row = {
        "reward": 0.5,
        "capo/rejection_rate": 0.012,
        "capo/trust/scale": 0.31,
        "capo/trust/measured_policy_shift": 1.5e-3,
    }
    assert describe(row) == "reward 0.50, shift 1.5e-03, rejected 1.2%, scale 0.31"
    assert describe({}) == ""


def test_the_last_row_of_a_log_in_the_making(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert last_row(path) is None
    path.write_text("")
    assert last_row(path) is None
    rows = [json.dumps({"step": step, "padding": "x" * 1000}) for step in range(200)]
    path.write_text("\n".join(rows) + "\n")
    assert last_row(path)["step"] == 199
    with path.open("a") as handle:
        handle.write('{"step": 200, "pad')
    assert last_row(path)["step"] == 199
