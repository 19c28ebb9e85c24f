"""What each of two processes runs: one size under an engine, its memory written as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from capo.integrations import _trl_world
from capo.lab.bench_plan import CASES, Runner, job_of
from distributed.worker import engine_settings, keep_fsdp_on_cpu

if __name__ == "__main__":
    engine, output = sys.argv[1:]
    keep_fsdp_on_cpu()
    summed: list[int] = []
    original = dist.all_reduce

    def counted(tensor, *args, **kwargs):
        if tensor.dim() == 2:  # a gradient of the head, not a handful of sums
            summed.append(tensor.nbytes)
        return original(tensor, *args, **kwargs)

    _trl_world.dist.all_reduce = counted
    (case,) = [each for each in CASES if each.name == "dense, 8k rows"]
    settings = engine_settings(engine, moe=False)
    if engine == "fsdp2":
        settings["fsdp_config"]["transformer_layer_cls_to_wrap"] = ["LlamaDecoderLayer"]
    found = Runner(case, job_of(case, 2, engine), settings).memory()
    assert dist.get_world_size() == 2
    rank = dist.get_rank()
    (Path(output) / f"{rank}.json").write_text(json.dumps({**vars(found), "summed": summed}))
    dist.destroy_process_group()
    # All is written; native threads of gloo may outlive the group, and a tidy exit then aborts.
    os._exit(0)
