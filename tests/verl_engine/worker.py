"""What every process of a distributed test runs: `worker.py FOLDER CASE…`, under torchrun.

Writes `FOLDER/CASE.WORLD.RANK.pt`: what the worker did, as seen by that process.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from verl.utils import tensordict_utils as tu

from verl_engine import job
from verl_engine.cases import CASES, Case
from verl_engine.cpu_worker import CPUTrainingWorker


def run(case: Case, folder: Path) -> dict[str, Any]:
    """Train as the case says; what came of it."""
    os.environ.pop("VERL_ENGINE_VENDOR", None)
    if case.vendor is not None:
        os.environ["VERL_ENGINE_VENDOR"] = case.vendor
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    config, loss = job.configs(case, folder, world)
    worker = CPUTrainingWorker(config)
    assert dist.get_world_size() == world
    worker.reset()
    worker.set_loss_fn(loss)
    if case.resume is not None:
        worker.load_checkpoint(str(folder / f"{case.resume}.{world}"))
    rows = torch.load(folder / "batch.pt")
    chosen = job.rows_of(case, world, rank)
    mine = {name: values[chosen] for name, values in rows.items()}
    metrics: list[dict[str, Any]] = []
    for update in range(case.updates):
        output = worker.train_mini_batch(job.mini_batch(mine, case))
        metrics.append(tu.get(output, "metrics"))
        if case.save is not None and update == 0:
            worker.save_checkpoint(str(folder / f"{case.save}.{world}"))
        if case.die and rank == world - 1:
            os.kill(os.getpid(), signal.SIGKILL)
    return {**worker.observed(), "metrics": metrics}


def main() -> None:
    """Run the cases one after the other."""
    folder = Path(sys.argv[1])
    for name in sys.argv[2:]:
        result = run(CASES[name], folder)
        path = folder / f"{name}.{result['world']}.{os.environ['RANK']}.pt"
        torch.save(result, path)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # All is written. Native threads of gloo outlive the group now and then, and the interpreter's tidy exit
    # then aborts ("terminate called without an active exception").
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
