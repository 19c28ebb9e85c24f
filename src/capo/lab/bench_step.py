"""What judging costs: a CAPO step against the same step of plain `GRPOTrainer`.

    python -m capo.lab.bench_step

Both trainers run the embedded policy on the same problems with the same seeds, in one process and
in alternating rounds, so that other load on the machine meets both alike. The learning rate is so
small that both policies stay the same and therefore write the same completions: step k of a round
is the same work for both, and the ratio is taken step by step.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from capo.core.errors import InputError

BUDGET = 1.15
"""Issue 1: a CAPO step costs at most this many plain steps."""


Times = tuple[float, float]
"""Wall-clock and CPU seconds."""


def _now() -> Times:
    return time.perf_counter(), time.process_time()


def _since(start: Times) -> Times:
    wall, cpu = _now()
    return wall - start[0], cpu - start[1]


@dataclass(frozen=True)
class StepBench:
    """Times per step, paired: entry k of both trainers is the same work.

    Attributes:
        plain: (wall, CPU) seconds of `GRPOTrainer`.
        capo: (wall, CPU) seconds of `CAPOTrainer`.
        judging: the part of `capo` in which tokens are judged, in (wall, CPU) seconds.
        threads: CPU threads of torch.
        completions: completions in a step.
        num_iterations: optimizer steps on the same completions.
    """

    plain: list[Times]
    capo: list[Times]
    judging: list[Times]
    threads: int
    completions: int
    num_iterations: int = 1

    @property
    def ratio(self) -> float:
        """Median over steps of CAPO's wall-clock time / the plain trainer's."""
        return self._ratio(0)

    @property
    def total_ratio(self) -> float:
        """All of CAPO's wall-clock time / all of the plain trainer's, whatever its share of each step."""
        return sum(wall for wall, _ in self.capo) / sum(wall for wall, _ in self.plain)

    @property
    def cpu_ratio(self) -> float:
        """The same of CPU time, which other processes on the machine disturb less."""
        return self._ratio(1)

    def _ratio(self, clock: int) -> float:
        # Whole batches: with several steps on the same completions the first one generates.
        k = self.num_iterations
        totals = [
            [sum(step[clock] for step in times[i : i + k]) for i in range(0, len(times), k)]
            for times in (self.capo, self.plain)
        ]
        capo, plain = totals
        return float(statistics.median(c / p for c, p in zip(capo, plain, strict=True)))

    def summary(self) -> str:
        """The medians and the ratios, for people."""

        def row(name: str, times: list[Times]) -> str:
            wall, cpu = (1e3 * statistics.median(clock) for clock in zip(*times, strict=True))
            return f"  {name:<22}{wall:9.1f} ms {cpu:9.1f} ms"

        verdict = "within" if self.ratio <= BUDGET else "over"
        return "\n".join(
            [
                f"{len(self.plain)} paired steps of {self.completions} completions, "
                f"{self.threads} threads, medians",
                f"  {'':<22}{'wall':>12} {'CPU':>12}",
                row("GRPOTrainer, a step", self.plain),
                row("CAPOTrainer, a step", self.capo),
                *([row("  of it judging", self.judging)] if self.judging else []),
                f"  {'ratio':<22}{self.ratio:9.3f}    {self.cpu_ratio:9.3f}",
                f"  {'ratio of the sums':<22}{self.total_ratio:9.3f}",
                f"  {verdict} the budget of {BUDGET}",
            ]
        )


def bench_step(
    *,
    steps: int = 8,
    warmup: int = 2,
    rounds: int = 4,
    threads: int = 2,
    completions: int = 96,
    policy: str = "embedded:sums",
    num_iterations: int = 1,
    num_generations: int = 8,
    **capo_settings: Any,
) -> StepBench:
    """Time plain and CAPO steps in alternating rounds.

    Args:
        steps: timed steps in a round.
        warmup: steps before them that are not timed.
        rounds: rounds of each trainer.
        threads: CPU threads for torch.
        completions: completions in a step.
        policy: what `capo.policies.load_policy` takes.
        num_iterations: optimizer steps on the same completions.
        num_generations: completions of a prompt, of which the step's are a multiple.
        **capo_settings: fields of `CAPOConfig`; by default ``selection="capo", trust_region=None``.

    Raises:
        InputError: a count is not positive, or the completions are not whole groups.
    """
    for name, value in {"steps": steps, "rounds": rounds, "threads": threads}.items():
        if value < 1:
            raise InputError(name, f"must be at least 1, got {value}")
    if warmup < 0:
        raise InputError("warmup", f"must be at least 0, got {warmup}")
    if num_generations < 2:
        raise InputError("num_generations", f"must be at least 2, got {num_generations}")
    if completions < 1 or completions % num_generations:
        raise InputError(
            "completions", f"must be a positive multiple of {num_generations}, got {completions}"
        )
    if num_iterations < 1 or steps % num_iterations or warmup % num_iterations:
        raise InputError("num_iterations", f"must divide steps and warmup, got {num_iterations}")
    capo_settings.setdefault("selection", "capo")
    capo_settings.setdefault("trust_region", None)
    times: dict[str, list[Times]] = {"plain": [], "capo": [], "judging": []}
    with _torch_threads(threads), tempfile.TemporaryDirectory() as directory:
        run = _Runner(
            policy, completions, steps + warmup, num_iterations, num_generations, directory
        )
        for index in range(rounds):
            # Whoever goes second may find a cooler or a busier machine: take turns.
            order = ("plain", "capo") if index % 2 == 0 else ("capo", "plain")
            for name in order:
                seconds, judging = run(name, seed=index, **capo_settings)
                times[name] += seconds[warmup:]
                times["judging"] += judging[warmup:]
    return StepBench(
        **times, threads=threads, completions=completions, num_iterations=num_iterations
    )


class _Runner:
    """Runs one trainer for one round."""

    def __init__(
        self,
        policy: str,
        completions: int,
        steps: int,
        num_iterations: int,
        num_generations: int,
        directory: str,
    ) -> None:
        from datasets import Dataset

        from capo.tasks import load_task

        self.policy, self.completions, self.steps = policy, completions, steps
        self.num_iterations, self.num_generations = num_iterations, num_generations
        self.directory = directory
        self.task = load_task("sums")
        problems = self.task.train_problems(steps * completions // num_generations, seed=0)
        self.answers = {problem.prompt: problem for problem in problems}
        self.dataset = Dataset.from_list([asdict(problem) for problem in problems])

    def __call__(self, name: str, seed: int, **settings: Any) -> tuple[list[Times], list[Times]]:
        from transformers import PrinterCallback
        from trl import GRPOConfig, GRPOTrainer

        from capo.integrations.trl import CAPOConfig, CAPOTrainer
        from capo.policies import load_policy

        policy = load_policy(self.policy)
        plain = name == "plain"
        common: dict[str, Any] = {
            "output_dir": self.directory,
            "per_device_train_batch_size": self.completions,
            "num_generations": self.num_generations,
            "max_completion_length": self.task.max_completion_tokens,
            "max_steps": self.steps,
            "learning_rate": 1e-9,
            "seed": seed,
            "num_iterations": self.num_iterations,
            "bf16": False,
            "activation_checkpointing": False,
            "use_cpu": True,
            "save_strategy": "no",
            "report_to": "none",
            "logging_steps": 1,  # what is worked out for the log alone is in the figure
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        trainer = (GRPOTrainer if plain else CAPOTrainer)(
            model=policy.model,
            reward_funcs=self._reward,
            args=GRPOConfig(**common) if plain else CAPOConfig(**common, **settings),
            train_dataset=self.dataset,
            processing_class=policy.tokenizer,
        )
        watch, judging = _stopwatch(), _JudgingTime(trainer)
        trainer.add_callback(watch)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return watch.steps, judging.per_step(self.steps)

    def _reward(self, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [
            self.task.grade(completion, self.answers[prompt])
            for prompt, completion in zip(prompts, completions, strict=True)
        ]


def _stopwatch() -> Any:
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):  # type: ignore[misc]
        """Times of every optimizer step, generation included."""

        def __init__(self) -> None:
            self.steps: list[Times] = []
            self._started = _now()

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self._started = _now()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.steps.append(_since(self._started))

    return Stopwatch()


class _JudgingTime:
    """Time spent in a trainer's judge; nothing is wrapped where there is none."""

    def __init__(self, trainer: Any) -> None:
        self.calls: list[Times] = []
        judge = getattr(trainer, "_judge", None)
        if judge is None:
            return
        inner = judge.judge

        def timed(*args: Any) -> Any:
            started = _now()
            verdict = inner(*args)
            self.calls.append(_since(started))
            return verdict

        judge.judge = timed

    def per_step(self, steps: int) -> list[Times]:
        """One entry per step, or none."""
        share = len(self.calls) // steps
        groups = [self.calls[i * share : (i + 1) * share] for i in range(steps)] if share else []
        return [(sum(wall for wall, _ in g), sum(cpu for _, cpu in g)) for g in groups]


@contextlib.contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main(arguments: list[str] | None = None) -> None:
    """Print the ratio."""
    parser = argparse.ArgumentParser(
        prog="capo bench step", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--steps", type=int, default=8, help="timed steps in a round")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps before them")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of each trainer")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--completions", type=int, default=96, help="completions in a step")
    parser.add_argument("--policy", default="embedded:sums", help="policy to train")
    parser.add_argument("--selection", default="capo", help="token selection, or none")
    parser.add_argument("--trust-region", default="none", help="auto, a policy shift, or none")
    parser.add_argument("--num-iterations", type=int, default=1, help="steps on a batch")
    parser.add_argument("--num-generations", type=int, default=8, help="completions of a prompt")
    options = vars(parser.parse_args(arguments))
    if options["selection"] == "none":
        options["selection"] = None
    warnings.simplefilter("ignore", FutureWarning)  # TRL and transformers about each other
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    print(bench_step(**options).summary())


if __name__ == "__main__":
    main()
