"""The plan's terms for several devices, against two real processes (torchrun, gloo, CPU)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from capo.lab.bench_plan import CASES, job_of
from capo.planning.architecture import architecture_of
from capo.planning.costs import costs_of
from distributed.test_engines import environment


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_memory_and_traffic_are_those_of_two_processes(engine, tmp_path):
    worker = Path(__file__).with_name("devices_worker.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, str(worker), engine, str(tmp_path)],
        env=environment(engine),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    (case,) = [each for each in CASES if each.name == "dense, 8k rows"]
    model, job = architecture_of(case.config), job_of(case, 2, engine)
    costs = costs_of(model, job)
    assert costs.symbols["N"] == 2
    # One gradient of the head a micro-batch is summed: what the plan sends twice, as a ring does.
    steps = 2
    gradients = [4 * model.head] * job.micro_batches * steps
    assert found[0]["summed"] == found[1]["summed"] == gradients
    (sent,) = [t for t in costs.terms if t.name.startswith("gradient of the head, summed")]
    assert sent.linked == 2 * sum(gradients) / steps / 2
    held = max(each["held_judging"] + each["held_trial"] for each in found)
    assert costs.held() == pytest.approx(held, rel=0.01)
    for part, kind in (("selection", "judging"), ("trust region", "trial")):
        real = max(each[f"held_{kind}"] + each[kind] for each in found)
        # FSDP2 frees in the trial what it has gathered before, which the profiler does not count: the
        # measured figure is too high by up to a few layers, and the plan's may be so much below it.
        least = 0.7 if (engine, part) == ("fsdp2", "trust region") else 0.95
        assert least * real <= costs.peak(part) <= 1.25 * real, (part, costs.peak(part), real)
