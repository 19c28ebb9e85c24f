"""A single controller with two workers under Ray: `ray_driver.py FOLDER CASE…`.

Writes `FOLDER/CASE.ray.RANK.pt`, as `worker.py` does.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import ray
import torch
from verl.single_controller.ray.base import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.utils import tensordict_utils as tu

from verl_engine import job
from verl_engine.cases import CASES, Case
from verl_engine.cpu_worker import CPUTrainingWorker

WORLD = 2


def run(case: Case, folder: Path) -> list[dict[str, Any]]:
    """Train as the case says; what came of it in each worker."""
    config, loss = job.configs(case, folder, WORLD)
    pool = RayResourcePool([WORLD], use_gpu=False, max_colocate_count=1)
    cls = RayClassWithInitArgs(ray.remote(CPUTrainingWorker), config=config)
    group = RayWorkerGroup(resource_pool=pool, ray_cls_with_init=cls, device_name="cpu")
    group.reset()
    group.set_loss_fn(loss)
    if case.resume is not None:
        group.load_checkpoint(str(folder / f"{case.resume}.ray"))
    # The controller hands every worker a contiguous part of the batch.
    chosen = [row for rank in range(WORLD) for row in job.rows_of(case, WORLD, rank)]
    rows = {name: values[chosen] for name, values in torch.load(folder / "batch.pt").items()}
    metrics = []
    for update in range(case.updates):
        output = group.train_mini_batch(job.mini_batch(rows, case)).get()
        metrics.append(tu.get(output, "metrics"))
        if case.save is not None and update == 0:
            group.save_checkpoint(str(folder / f"{case.save}.ray"))
        if case.die:
            os.kill(group.observed()[-1]["pid"], signal.SIGKILL)
    observed = group.observed()
    assert {one["world"] for one in observed} == {WORLD}
    assert len({one["pid"] for one in observed} | {os.getpid()}) == WORLD + 1
    for worker in group.workers:
        ray.kill(worker)
    for placement in pool.get_placement_groups():
        ray.util.remove_placement_group(placement)
    return [{**one, "metrics": metrics} for one in observed]


def main() -> None:
    """Run the cases one after the other, in a Ray of this process's own."""
    folder = Path(sys.argv[1])
    ray.init(num_cpus=WORLD, include_dashboard=False, logging_level="warning")
    for name in sys.argv[2:]:
        for rank, result in enumerate(run(CASES[name], folder)):
            torch.save(result, folder / f"{name}.ray.{rank}.pt")
    ray.shutdown()


if __name__ == "__main__":
    main()
