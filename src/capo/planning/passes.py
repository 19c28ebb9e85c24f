"""Passes of the policy: those that CAPO adds, and the update without it."""

from __future__ import annotations

import math

from capo.planning.architecture import Architecture
from capo.planning.job import Job
from capo.planning.work import Term

# Bytes read and written, per element.
ACTIVATION = 60  # passes over [tokens, d] in a layer's forward pass
OPTIMIZER = 56  # a parameter in clip, AdamW's step and zero_grad
LOSS_LOGIT = 60  # a logit's way through the trainer's loss, forward and backward


def forward_terms(
    model: Architecture, job: Job, part: str, sequences: int, times: float, name: str
) -> list[Term]:
    """``times`` forward passes of the policy over so many sequences."""
    tokens = sequences * (job.prompt + job.length)
    rows = job.micro_batches and math.ceil(sequences / job.micro_batches)
    activations = rows * (job.prompt + job.length) * 12 * model.width * job.pass_bytes
    return [
        Term(
            part,
            name,
            "F·(2·P_active·S·(prompt + completion) + attention) flops",
            flops=times * (2.0 * model.active * tokens + attention(model, job, sequences)),
            moved=times * ACTIVATION * model.layers * tokens * model.width * job.pass_bytes,
            linked=times * gathered_weights(model, job),
            memory=1.0 * activations,
            phase=f"{part}: trial",
        )
    ]


def gathered_weights(model: Architecture, job: Job) -> float:
    """Bytes of a forward pass's own gathers, where weights are sharded."""
    if job.alone or job.sharding in ("ddp", "zero2"):
        return 0.0
    return job.pass_bytes * model.parameters * (job.gpus - 1) / job.gpus


def attention(model: Architecture, job: Job, sequences: int) -> float:
    """Flops of causal attention's products in one forward pass."""
    span = job.prompt + job.length
    return 2.0 * sequences * span * span * model.attention


def plain_terms(model: Architecture, job: Job) -> list[Term]:
    """Terms of the update alone: training passes of the micro-batches and the optimizer's step."""
    rows = job.micro_batches * job.micro_batch
    tokens = rows * (job.prompt + job.length)
    times = 4.0 if job.checkpointing else 3.0
    logits = rows * job.length * model.vocabulary
    own = job.shard(model.parameters, of="optimizer") if not job.alone else model.parameters
    linked = 0.0
    if not job.alone:
        share = (job.gpus - 1) / job.gpus
        gradients = 2.0 * model.parameters * job.weight_bytes
        gathers = (times - 1.0) * job.micro_batches * gathered_weights(model, job)
        linked = share * gradients + gathers
    return [
        Term(
            "plain",
            "forward and backward passes",
            f"{times:g}·2·P_active·tokens flops, and attention",
            flops=times * (2.0 * model.active * tokens + attention(model, job, rows)),
            moved=times * ACTIVATION * model.layers * tokens * model.width * job.pass_bytes,
        ),
        Term(
            "plain",
            "head and loss",
            f"8·V·d flops and {LOSS_LOGIT}·V bytes a completion token",
            flops=8.0 * logits * model.width,
            moved=1.0 * LOSS_LOGIT * logits,
        ),
        Term("plain", "optimizer", f"{OPTIMIZER} bytes a parameter held", moved=OPTIMIZER * own),
        Term("plain", "gradients reduced, weights gathered", "by the engine", linked=linked),
    ]


def optimizer_bytes(job: Job) -> float:
    """Bytes of a parameter in gradient and optimizer: Adam's two moments, and a float32 copy beside bf16."""
    moments = 2.0 * (2 if job.precision == "bf16" else 4)
    copy = 4.0 if job.sharding in ("zero2", "zero3") and not job.alone else 0.0
    return moments + copy + job.weight_bytes
