"""What CAPO costs: a CAPO step against the same step of plain `GRPOTrainer`.

    python -m capo.lab.bench_step

Both trainers run the embedded policy on the same problems with the same seeds, in one process and
in alternating rounds, so that other load on the machine meets both alike. The learning rate is so
small that both policies stay the same and therefore write the same completions: step k of a round
is the same work for both, and the ratio is taken step by step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from capo.core.errors import InputError
from capo.lab.provenance import collect_provenance
from capo.lab.rundir import write_text

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
        own: the part of `capo` in which tokens are judged and steps are foreseen, shortened and measured,
            in (wall, CPU) seconds.
        threads: CPU threads of torch.
        completions: completions in a step.
        num_iterations: optimizer steps on the same completions.
    """

    plain: list[Times]
    capo: list[Times]
    own: list[Times]
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
    def total_cpu_ratio(self) -> float:
        """The same of CPU time, which other processes on the machine disturb less."""
        return sum(cpu for _, cpu in self.capo) / sum(cpu for _, cpu in self.plain)

    @property
    def own_share(self) -> float:
        """CPU time of CAPO's own work / all of the plain trainer's.

        What CAPO spares elsewhere (TRL's pass for old log-probabilities) is not set off against it.
        """
        return sum(cpu for _, cpu in self.own) / sum(cpu for _, cpu in self.plain)

    @property
    def cpu_ratio(self) -> float:
        """`ratio` of CPU time."""
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
                *([row("  of it CAPO's own", self.own)] if self.own else []),
                f"  {'ratio':<22}{self.ratio:9.3f}    {self.cpu_ratio:9.3f}",
                f"  {'ratio of the sums':<22}{self.total_ratio:9.3f}    {self.total_cpu_ratio:9.3f}",
                f"  {'own work / plain':<22}{'':9}    {self.own_share:9.3f}",
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
    times: dict[str, list[Times]] = {"plain": [], "capo": [], "own": []}
    with _torch_threads(threads), tempfile.TemporaryDirectory() as directory:
        run = _Runner(
            policy, completions, steps + warmup, num_iterations, num_generations, directory
        )
        for index in range(rounds):
            # Whoever goes second may find a cooler or a busier machine: take turns.
            order = ("plain", "capo") if index % 2 == 0 else ("capo", "plain")
            for name in order:
                seconds, own = run(name, seed=index, **capo_settings)
                times[name] += seconds[warmup:]
                times["own"] += own[warmup:]
    return StepBench(
        **times, threads=threads, completions=completions, num_iterations=num_iterations
    )


UNDISTURBED: dict[str, Any] = {
    "bf16": False,
    "activation_checkpointing": False,
    "use_cpu": True,
    "save_strategy": "no",
    "report_to": "none",
    "logging_steps": 1,  # what is worked out for the log alone is in the figure
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
"""Settings of a trainer that is timed: on the CPU, in float32, nothing but the steps."""

SIZES = {  # completions, steps on a batch, completions of a prompt
    "96 completions, one pass": (96, 1, 8),
    "24 completions, four passes": (24, 4, 8),
    "8 completions, four passes (the default)": (8, 4, 4),
}
SHARE = 0.05
"""What the default predictor may cost, as a share of a step."""


def cost_report(output: Path, **timing: Any) -> dict[str, Any]:
    """The trust region's cost at every one of ``SIZES``, as the study's report shows it.

    Args:
        output: where it will be written, for the command that it names.
        **timing: of :func:`bench_step`: steps, warmup, rounds, threads, policy.
    """
    rows, goals = [], []
    busy = os.getloadavg()[0]
    for name, (completions, passes, group) in SIZES.items():
        made = bench_step(
            completions=completions,
            num_iterations=passes,
            num_generations=group,
            selection=None,
            trust_region="auto",
            **timing,
        )
        plain, ours, own = (
            1e3 * sum(cpu for _, cpu in times) / len(times)
            for times in (made.plain, made.capo, made.own)
        )
        rows.append(
            {
                "completions a step": completions,
                "steps on a batch": passes,
                "completions a prompt": group,
                "GRPO step (CPU ms)": round(plain, 1),
                "with trust region (CPU ms)": round(ours, 1),
                "of it its own work (CPU ms)": round(own, 2),
                "own work / GRPO step": round(made.own_share, 3),
                "ratio of the steps": round(made.total_cpu_ratio, 3),
            }
        )
        for what, goal, value, limit in (
            ("own work", f"≤ {SHARE:g} of a step", made.own_share, SHARE),
            ("whole step", f"ratio ≤ {1 + SHARE:g}", made.total_cpu_ratio, 1 + SHARE),
        ):
            reached = value <= limit
            goals.append(
                {
                    "name": f"cost, {name}, {what}",
                    "goal": goal,
                    "value": f"{value:.3f}",
                    "reached": reached,
                }
            )
    hardware = collect_provenance()["hardware"]
    return {
        "title": "Cost of the default predictor",
        "command": f"capo bench step --cost {output} "
        + " ".join(f"--{key} {value}" for key, value in timing.items() if key != "policy"),
        "rows": rows,
        "goals": goals,
        "notes": [
            f"{timing['steps'] * timing['rounds']} paired steps each on {hardware['cpu']}, CPU time, means; "
            f"ratios alone are to be read; {busy:.1f} processes were at work on {hardware['cores']} cores "
            "when it began. *Own work*: collecting, trials, choosing, measuring. With several passes "
            "CAPO leaves out the forward pass of TRL "
            "for the old log-probabilities (the first training pass shows them), so that a whole step costs "
            "less than a TRL step and its own work.",
        ],
    }


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
            **UNDISTURBED,
        }
        trainer = (GRPOTrainer if plain else CAPOTrainer)(
            model=policy.model,
            reward_funcs=self._reward,
            args=GRPOConfig(**common) if plain else CAPOConfig(**common, **settings),
            train_dataset=self.dataset,
            processing_class=policy.tokenizer,
        )
        watch, own = _stopwatch(), _OwnTime(trainer)
        trainer.add_callback(watch)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return watch.steps, own.per_step(self.steps)

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


class _OwnTime:
    """Time spent in a trainer's judge and in its step control; nothing is wrapped where there is none."""

    def __init__(self, trainer: Any) -> None:
        self.calls: list[Times] = []
        around_step = ("collect", "before_step", "restore", "after_step")
        for part, names in {"_judge": ("judge",), "_control": around_step}.items():
            owner = getattr(trainer, part, None)
            for name in names if owner is not None else ():
                setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = _now()
            result = inner(*args, **kwargs)
            self.calls.append(_since(started))
            return result

        return timed

    def per_step(self, steps: int) -> list[Times]:
        """One entry per step, or none: every step has the same calls, in the same order."""
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
    parser.add_argument(
        "--cost",
        metavar="FILE",
        type=Path,
        help="measure the trust region at the sizes of the report instead, and write them there",
    )
    options = vars(parser.parse_args(arguments))
    cost = options.pop("cost")
    if options["selection"] == "none":
        options["selection"] = None
    warnings.simplefilter("ignore", FutureWarning)  # TRL and transformers about each other
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if cost is None:
        print(bench_step(**options).summary())
        return
    timing = {key: options[key] for key in ("steps", "warmup", "rounds", "threads", "policy")}
    write_text(cost, json.dumps(cost_report(cost, **timing), indent=1, ensure_ascii=False) + "\n")
    print(f"written: {cost}")


if __name__ == "__main__":
    main()
