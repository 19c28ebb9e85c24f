"""verl's training worker, on gloo, that tells what it did."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from verl.single_controller.base.decorator import Dispatch, register
from verl.workers.engine_workers import TrainingWorker


class CPUTrainingWorker(TrainingWorker):
    """verl asks for `cpu:gloo,cpu:gloo`, which torch refuses; a group that is there it takes."""

    def __init__(self, config: Any) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        if not dist.is_initialized():
            dist.init_process_group(
                "gloo",
                rank=int(os.environ["RANK"]),
                world_size=int(os.environ["WORLD_SIZE"]),
                init_method=os.environ.get("DIST_INIT_METHOD"),
            )
        super().__init__(config)
        self.records: list[dict[str, Any]] = []
        if hasattr(self.engine, "token_callbacks"):
            self.engine.token_callbacks.append(lambda record: self.records.append(vars(record)))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def observed(self) -> dict[str, Any]:
        """The engine that verl chose, the processes, the verdicts and the weights."""
        state = self.engine.module.state_dict()
        return {
            "engine": type(self.engine).__name__,
            "world": dist.get_world_size(),
            "pid": os.getpid(),
            "records": self.records,
            "weights": {name: _whole(value) for name, value in state.items()},
        }


def _whole(value: Any) -> torch.Tensor:
    whole = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole.detach().clone()
