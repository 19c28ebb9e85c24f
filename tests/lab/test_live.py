"""The live view over several runs, without a process: what stands on the screen after every event."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from capo.lab.live import View
from run_kit import tiny
from terminal_kit import Screen


def row(step: int, **values: float) -> dict[str, float]:
    return {"step": step, "completions": 16 * step, "seconds": 1.0 * step, **values}


def evaluation(step: int, accuracy: float) -> dict[str, float]:
    return {**row(step), "accuracy": accuracy, "stderr": 0.01, "problems": 8}


@pytest.fixture
def stream(monkeypatch):
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    return io.StringIO()


def console_on(stream: io.StringIO) -> Console:
    return Console(
        file=stream, force_terminal=True, width=100, color_system=None, legacy_windows=False
    )


def screen_of(stream: io.StringIO) -> str:
    screen = Screen(100)
    screen.feed(stream.getvalue().replace("\n", "\r\n"))
    return screen.text


def test_one_view_spans_several_runs(stream) -> None:
    first, second, third = (tiny(f'run.name="{name}"') for name in ("one", "two", "three"))
    view = View(console_on(stream), total=3 * first.completions_after(first.steps))
    view.started(first, 0)
    view.evaluated(evaluation(0, 0.45))
    view.stepped(row(1, reward=0.5, **{"capo/trust/scale": 0.25}))
    view.warned("early warning at step 1: too long")
    view.evaluated(evaluation(4, 0.9))
    view.stopped()
    view.skipped(second)
    view.started(third, 0)
    view.stepped(row(2, reward=0.75))
    view.live.refresh()
    text = screen_of(stream)
    assert "early warning at step 1: too long" in text
    assert "one: accuracy 0.450 → 0.900 ± 0.010" in text
    assert "three" in text
    assert " 83% " in text  # one run, one that was there, half of the third
    assert "step 2/4" in text
    assert "trust-region scale" not in text  # this run has said nothing of it
    assert text.rstrip().endswith("none")  # nor been warned
    view.stopped()
    assert screen_of(stream).count("warnings") == 1


def test_what_is_not_logged_has_no_line(stream) -> None:
    view = View(console_on(stream))
    view.started(tiny(), 0)
    view.stepped(row(1, **{"capo/trust/measured_policy_shift": 1e-3, "reward": float("nan")}))
    view.warned("one")
    view.stepped(row(2, **{"capo/trust/measured_policy_shift": 2e-3, "capo/trust/budget": 4e-3}))
    view.warned("two")
    view.stopped()
    text = screen_of(stream)
    assert "policy shift        2.0e-03 nats a token of 4.0e-03" in text
    for name in ("reward", "rejected", "accuracy", "entropy"):
        assert f"  {name} " not in text
    assert "2, the last at step 2" in text


def test_a_view_that_never_began_leaves_nothing(stream) -> None:
    View(console_on(stream)).stopped()
    assert screen_of(stream) == ""
