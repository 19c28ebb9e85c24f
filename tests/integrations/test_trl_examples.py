"""The example and the benchmark run, on the embedded policy."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from capo import InputError
from capo.lab import bench_step

EXAMPLE = Path(__file__).parents[2] / "examples" / "trl_minimal.py"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_minimal_example(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("trl_minimal", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    trainer = module.main(max_steps=2, output_dir=str(tmp_path))
    rows = [row for row in trainer.state.log_history if "capo/trust/scale" in row]
    assert len(rows) == 2
    assert 0.2 < rows[0]["rewards/accuracy/mean"] < 0.8  # the policy can, and does not prefer to
    for row in rows[1:]:  # the schedule's first learning rate may be 0
        assert 0 < row["capo/trust/scale"] < 1
        assert 0 < row["capo/trust/predicted_policy_shift"] <= row["capo/trust/budget"]


@pytest.mark.slow
def test_benchmark_pairs_equal_work(capsys: pytest.CaptureFixture[str]) -> None:
    """What the figure is, not how large: that is for a machine with nothing else to do."""
    result = bench_step.bench_step(steps=2, warmup=0, rounds=2, threads=1, completions=16)
    assert len(result.plain) == len(result.capo) == len(result.own) == 4
    for ours, judging in zip(result.capo, result.own, strict=True):
        assert 0 < judging[0] < ours[0]
    assert result.ratio > 0
    bench_step.main(
        ["--steps", "1", "--warmup", "0", "--rounds", "1", "--threads", "1", "--completions", "8"]
    )
    assert "ratio" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"completions": 12}, r"completions: .*multiple of 8, got 12"),
        ({"steps": 0}, r"steps: must be at least 1"),
        ({"warmup": -1}, r"warmup: must be at least 0"),
    ],
)
def test_benchmark_names_bad_counts(options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match="^" + message):
        bench_step.bench_step(**options)
