"""The cost model of `capo plan` against what a real `CAPOTrainer` allocates and takes, at several sizes.

    python -m capo.lab.bench_plan --output results/plan

Memory is what torch's profiler sees allocated and freed (CPU allocator, every byte) inside the
judgement of a micro-batch and inside the trust region, on top of what they hold between calls. Time is
the CPU time of an update of `CAPOTrainer` over that of `GRPOTrainer` on the same model and batch, in
alternating rounds; the model is given the rates of matrix products and of memory that are measured on
the machine beforehand.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from capo.core.errors import InputError
from capo.lab.allocation import Allocated, allocations
from capo.lab.bench_step import UNDISTURBED
from capo.lab.options import at_least_one
from capo.planning.architecture import architecture_of
from capo.planning.costs import costs_of
from capo.planning.job import Job, Sharding
from capo.planning.work import Rates

if TYPE_CHECKING:
    from trl import GRPOTrainer

PROMPT = 8  # about so many tokens has a prompt of the embedded task


@dataclass(frozen=True)
class Case:
    """One size at which the model is held against the real thing.

    Attributes:
        name: of the size.
        config: arguments of the model's configuration, `model_type` among them.
        completions, length, iterations, top_k: as in :class:`capo.planning.job.Job`.
    """

    name: str
    config: dict[str, Any]
    completions: int = 16
    length: int = 32
    iterations: int = 1
    top_k: int = 50


def _dense(family: str, d: int, layers: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": family,
        "hidden_size": d,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 3 * d,
        "tie_word_embeddings": False,
        **more,
    }


CASES = (
    Case("small vocabulary", _dense("qwen2", 128, 2, 4096)),
    Case("dense, 8k rows", _dense("llama", 192, 3, 8192)),
    Case("dense, 16k rows", _dense("qwen2", 256, 4, 16384), iterations=2),
    Case("dense, 32k rows", _dense("mistral", 384, 4, 32768), completions=8),
    Case("long completions", _dense("qwen2", 128, 2, 16384), length=128, completions=8),
    Case(
        "mixture of experts",
        _dense(
            "qwen3_moe",
            192,
            3,
            8192,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=192,
            head_dim=48,
        ),
    ),
)


@dataclass(frozen=True)
class Compared:
    """Predicted and measured, bytes and ratios.

    Attributes:
        case: the size.
        judging: (predicted, measured) most bytes while tokens are judged, moments included.
        trial: (predicted, measured) most bytes in the trust region, samples included.
        held: (predicted, measured) bytes held between steps.
        ratio: (predicted, measured) time of a CAPO update / a plain one.
        seconds: measured CPU seconds of a plain update and of a CAPO one.
    """

    case: Case
    judging: tuple[float, float]
    trial: tuple[float, float]
    held: tuple[float, float]
    ratio: tuple[float, float]
    seconds: tuple[float, float]


def job_of(case: Case, gpus: int = 1, sharding: Sharding = "ddp") -> Job:
    """The job that the bench runs: float32, two micro-batches a step, the same batch on every device."""
    return Job(
        gpus=gpus,
        sharding=sharding,
        precision="float32",
        completions=case.completions * gpus,
        prompt=PROMPT,
        length=case.length,
        group=4,
        micro_batch=case.completions // 2,
        iterations=case.iterations,
        checkpointing=False,
        top_k=case.top_k,
        selection=True,
        trust_region=True,
    )


def compare(case: Case, rates: Rates, *, steps: int, rounds: int) -> Compared:
    """Run one size and hold the model against it."""
    model, job = architecture_of(case.config), job_of(case)
    costs = costs_of(model, job)
    runner = Runner(case)
    memory = runner.memory()
    clocks: dict[str, list[float]] = {"plain": [], "capo": []}
    for index in range(rounds):
        for name in ("plain", "capo") if index % 2 == 0 else ("capo", "plain"):
            clocks[name] += runner.seconds(name, steps)
    plain, capo = (statistics.median(clocks[name]) for name in ("plain", "capo"))
    update = costs.plain_seconds(rates)
    return Compared(
        case,
        (costs.peak("selection"), memory.held_judging + memory.judging),
        (costs.peak("trust region"), memory.held_trial + memory.trial),
        (costs.held(), memory.held_judging + memory.held_trial),
        ((update + costs.seconds(rates)) / update, capo / plain),
        (plain, capo),
    )


@dataclass
class Memory:
    """Measured bytes: held before the last call of a step, and the most that the call adds."""

    held_judging: float = 0.0
    judging: float = 0.0
    held_trial: float = 0.0
    trial: float = 0.0


class Runner:
    """Trains a random policy of a size, plainly or with CAPO.

    Args:
        case: the size.
        job: as it is run; None for :func:`job_of` of the case.
        settings: more arguments of the trainer, such as those of its engine.
    """

    def __init__(
        self, case: Case, job: Job | None = None, settings: dict[str, Any] | None = None
    ) -> None:
        self.case = case
        self.job = job or job_of(case)
        self.settings = settings or {}

    def trainer(self, name: str, steps: int, directory: str) -> GRPOTrainer:
        """A trainer whose policy writes completions of one length."""
        from datasets import Dataset
        from transformers import AutoConfig, AutoModelForCausalLM, PrinterCallback
        from trl import GRPOConfig, GRPOTrainer

        from capo.integrations.trl import CAPOConfig, CAPOTrainer
        from capo.policies import load_policy
        from capo.tasks import load_task

        case, job = self.case, self.job
        tokenizer = load_policy("embedded:sums").tokenizer
        torch.manual_seed(0)
        settings = {k: v for k, v in case.config.items() if k != "model_type"}
        config = AutoConfig.for_model(
            case.config["model_type"], **settings, bos_token_id=0, eos_token_id=1, pad_token_id=0
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        problems = load_task("sums").train_problems(max(8, steps * job.completions), seed=0)
        common: dict[str, Any] = {
            "output_dir": directory,
            "per_device_train_batch_size": job.micro_batch,
            "gradient_accumulation_steps": job.micro_batches,
            "num_generations": job.group,
            "max_completion_length": case.length,
            "generation_kwargs": {"min_new_tokens": case.length},
            "max_steps": steps,
            "learning_rate": 1e-5,
            "num_iterations": case.iterations,
            **UNDISTURBED,
            **self.settings,
        }
        plain = name == "plain"
        own: dict[str, Any] = {
            "selection": "capo",
            "trust_region": "auto",
            "curvature_top_k": case.top_k,
        }
        trainer = (GRPOTrainer if plain else CAPOTrainer)(
            model=model,
            reward_funcs=_reward,
            args=GRPOConfig(**common) if plain else CAPOConfig(**common, **own),
            train_dataset=Dataset.from_list([{"prompt": p.prompt} for p in problems]),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def memory(self) -> Memory:
        """Bytes of the last of a few steps."""
        found = Memory()
        with tempfile.TemporaryDirectory() as directory, torch_options(compile=False):
            # The first step has more trials, and the pace is known after it.
            trainer: Any = self.trainer("capo", 2 * self.case.iterations, directory)
            judge, control = trainer._judge, trainer._control

            def judged(allocated: Allocated) -> None:
                found.judging = allocated.peak

            def tried(allocated: Allocated) -> None:
                found.trial = max(found.trial, allocated.peak)

            def held_judging() -> None:
                moments = judge.step_model.moments
                tensors = [moments.exp_avg, moments.exp_avg_sq, moments.grad] if moments else []
                found.held_judging = _bytes(tensors)

            def held_trial() -> None:
                found.trial = 0.0
                now, previous = control._collector._now, control._collector._previous
                tensors = [sample.hidden for sample in now.samples]
                if previous is not None:
                    tensors += [s.hidden for s in previous.batch.samples]
                    tensors += [previous.batch.reference.log_probs, previous.batch.hidden]
                found.held_trial = _bytes(tensors)

            # With the head, which is gathered for it where it is sharded.
            trainer._select = _profiled(trainer._select, judged, held_judging)
            control.before_step = _profiled(control.before_step, tried, held_trial)
            control.after_step = _profiled(control.after_step, tried)
            trainer.train()
        return found

    def seconds(self, name: str, steps: int) -> list[float]:
        """CPU seconds of every update but the first two batches', completions and rewards left out."""
        with tempfile.TemporaryDirectory() as directory:
            warm, each = 2, self.case.iterations
            trainer = self.trainer(name, (warm + steps) * each, directory)
            clock = _UpdateClock(trainer)
            trainer.train()
        updates = clock.seconds[warm * each :]
        return [sum(updates[i : i + each]) / each for i in range(0, len(updates), each)]


def _reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(sum(ids) % 7 < 3) for ids in completion_ids]


def _profiled(
    call: Callable[..., Any],
    report: Callable[[Allocated], None],
    before: Callable[[], None] | None = None,
) -> Callable[..., Any]:
    def profiled(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before()
        result, allocated = allocations(lambda: call(*args, **kwargs))
        report(allocated)
        return result

    return profiled


def _bytes(tensors: list[Any]) -> float:
    """Of the storages, each once."""
    storages = [t.untyped_storage() for t in tensors if t is not None]
    return float(sum({s.data_ptr(): s.nbytes() for s in storages}.values()))


def torch_options(**changes: Any) -> Any:
    """The statistics' options for a while: what the compiler fuses the profiler does not see."""
    from capo.core.statistics import options

    return options(**changes)


class _UpdateClock:
    """CPU seconds from the first loss of a step to its end."""

    def __init__(self, trainer: Any) -> None:
        from transformers import TrainerCallback

        self.seconds: list[float] = []
        self._began: float | None = None
        clock, loss = self, trainer._compute_loss

        def timed(*args: Any, **kwargs: Any) -> Any:
            if clock._began is None:
                clock._began = time.process_time()
            return loss(*args, **kwargs)

        class End(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                if clock._began is not None:
                    clock.seconds.append(time.process_time() - clock._began)
                clock._began = None

        trainer._compute_loss = timed
        trainer.add_callback(End())


def measured_rates() -> Rates:
    """What this machine attains: float32 products of a training pass's shape, and memory."""

    def seconds(call: Callable[[], Any]) -> float:
        found = []
        for _ in range(7):
            began = time.process_time()
            call()
            found.append(time.process_time() - began)
        return statistics.median(found)

    # As they occur: a block of logits, and a tensor of them that is made anew by each operation.
    a, b = torch.randn(256, 256), torch.randn(1024, 256)
    flops = 2.0 * 256 * 256 * 1024 / seconds(lambda: a @ b.T)
    x = torch.randn(1 << 23)
    bandwidth = 8.0 * x.numel() / seconds(lambda: torch.exp(x))
    return Rates("this machine", flops, flops, bandwidth, bandwidth)


def run(cases: list[Case], output: Path | None, *, steps: int, rounds: int) -> list[Compared]:
    """Compare the cases, print them, and write them where asked to."""
    from capo.lab.bench_plan_report import table, write

    rates = measured_rates()
    found = []
    for case in cases:
        found.append(compare(case, rates, steps=steps, rounds=rounds))
        print(f"{case.name}: done", flush=True)
    print(table(found))
    if output is not None:
        write(found, rates, output)
        print(f"written to {output}")
    return found


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``capo bench plan``."""
    parser = argparse.ArgumentParser(
        prog="capo bench plan", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--output", type=Path, default=None, help="folder of the results")
    parser.add_argument("--case", action="append", help="one of the sizes [default: all]")
    parser.add_argument("--steps", type=int, default=3, help="timed batches in a round")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of each trainer")
    options = parser.parse_args(arguments)
    at_least_one(options, "steps", "rounds")
    known = {case.name: case for case in CASES}
    for name in options.case or ():
        if name not in known:
            raise InputError("--case", f"must be one of {', '.join(known)}, got {name!r}.")
    warnings.simplefilter("ignore", FutureWarning)  # TRL and transformers about each other
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    torch.set_num_threads(1)
    chosen = [known[name] for name in options.case] if options.case else list(CASES)
    run(chosen, options.output, steps=options.steps, rounds=options.rounds)


if __name__ == "__main__":
    main()
