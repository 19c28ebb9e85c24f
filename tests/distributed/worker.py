"""What every process of a distributed test runs: `worker.py ENGINE OUTPUT CASE…`.

Writes `OUTPUT/CASE.RANK.pt`: what the trainer did, as seen by that process.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from transformers import TrainerCallback
from trl import GRPOTrainer

from capo import InputError
from capo.integrations.trl import CAPOTrainer
from distributed import fixed
from distributed.cases import CASES, Case, build_policy
from integrations import trl_kit as kit
from integrations.vllm_kit import served

ZERO: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_force_ds_cpu_optimizer": False,
    "bf16": {"enabled": False},
    "fp16": {"enabled": False},
}


WARMUP = {"warmup_min_lr": 0.0, "warmup_max_lr": 1e-2, "warmup_num_steps": 3}
SCHEDULER = {"type": "WarmupLR", "params": {**WARMUP, "warmup_type": "linear"}}


def engine_settings(engine: str, *, moe: bool, scheduled: bool = False) -> dict[str, Any]:
    """What of the trainer's arguments makes it run on this engine."""
    if engine == "fsdp2":
        return {
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "reshard_after_forward": True,
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "transformer_layer_cls_to_wrap": [
                    "Qwen2MoeDecoderLayer" if moe else "Qwen2DecoderLayer"
                ],
                "state_dict_type": "FULL_STATE_DICT",
                "cpu_ram_efficient_loading": False,
            },
        }
    if engine in ("zero2", "zero3"):
        stage = int(engine[-1])
        zero: dict[str, Any] = {"stage": stage}
        if stage == 3:
            zero |= {"stage3_param_persistence_threshold": 0}
        own = {"scheduler": SCHEDULER} if scheduled else {}
        return {"deepspeed": {**ZERO, "zero_optimization": zero, **own}}
    return {}


def keep_fsdp_on_cpu() -> None:
    """accelerate turns FSDP on a CPU into DDP without a word; torch's FSDP2 runs there well enough."""
    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        fresh = AcceleratorState._shared_state == {}
        original(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if fresh and plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = plugin

    AcceleratorState.__init__ = init


def whole(instance: Any) -> dict[str, torch.Tensor]:
    """Every parameter in full, under its own name."""
    model = instance.accelerator.unwrap_model(instance.model)
    found = {}
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                found[name] = parameter.detach().clone()
        elif hasattr(parameter, "full_tensor"):
            found[name] = parameter.full_tensor().detach().clone()
        else:
            found[name] = parameter.detach().clone()
    return {name.replace("_checkpoint_wrapped_module.", ""): v for name, v in found.items()}


class DieAt(TrainerCallback):  # type: ignore[misc]
    """This process is killed, as by the kernel, at the beginning of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class WeightsAfter(TrainerCallback):  # type: ignore[misc]
    """The weights at the beginning and after every step."""

    def __init__(self, instance: Any) -> None:
        self.instance = instance
        self.found: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.found.append(whole(self.instance))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.found.append(whole(self.instance))


def forget_deepspeed() -> None:
    """The case before may have been on ZeRO-3, under which transformers would shard the next one's model."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def run(case: Case, engine: str, output: Path, world: int, rank: int) -> dict[str, Any]:
    """Train as the case says; what came of it."""
    forget_deepspeed()
    torch.manual_seed(0)
    records: list[Any] = []
    shifts: list[Any] = []
    classes: dict[str, Any] = {
        "fixed": {"capo": fixed.FixedCAPO, "grpo": fixed.FixedGRPO},
        "generated": {"capo": CAPOTrainer, "grpo": GRPOTrainer},
    }
    cls = classes["fixed" if case.fixed else "generated"][case.trainer]
    own = engine_settings(engine, moe=case.moe, scheduled=case.scheduled)
    settings = {**case.settings, **own}
    model = build_policy(case)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    if case.fixed:
        instance = fixed.make(
            output / case.name,
            cls=cls,
            model=model,
            plain=build_policy(case),
            world=world,
            rank=rank,
            records=records,
            shifts=shifts,
            **settings,
        )
    else:
        settings["per_device_train_batch_size"] = fixed.ROWS // world
        with served() if case.served else nullcontext():
            instance = kit.trainer(output / case.name, cls=cls, model=model, **settings)
    if case.corrected:
        instance.use_vllm = True  # as far as the loss is concerned
    after = WeightsAfter(instance)
    if case.served:
        instance.add_callback(after)
    if case.infinite_at is not None:
        advantages = instance.batches[case.infinite_at]["advantages"]
        advantages[advantages.numel() - 1] = float("inf")
    if case.die_at is not None and rank == world - 1:
        instance.add_callback(DieAt(case.die_at))
    resume = None
    if case.resume is not None:
        resume = str(output / case.resume[0] / f"checkpoint-{case.resume[1]}")
    instance.train(resume_from_checkpoint=resume)
    kinds = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert instance.accelerator.num_processes == world
    if world > 1:
        assert torch.distributed.get_world_size() == world == 2
        assert instance.accelerator.distributed_type.value == kinds[engine]
    control = getattr(instance, "_control", None)
    server = getattr(getattr(instance, "vllm_generation", None), "vllm_client", None)
    return {
        "start": start,
        "weights": whole(instance),
        "log": instance.state.log_history,
        "records": [vars(record) for record in records],
        "shifts": [vars(shift) for shift in shifts],
        "state": None if control is None else control.state_dict(),
        "after": after.found,
        "received": None if server is None else server.received,
    }


def main(engine: str, output: str, *names: str) -> None:
    """Run the cases one after the other in this process."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    if engine == "fsdp2":
        keep_fsdp_on_cpu()
    for name in names:
        try:
            result = run(CASES[name], engine, Path(output), world, rank)
        except InputError as error:
            result = {"refused": str(error)}
        torch.save(result, Path(output) / f"{name}.{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    # All is written. Native threads of gloo and DeepSpeed outlive the group now and then, and the
    # interpreter's tidy exit then aborts ("terminate called without an active exception").
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
