"""Measurements beside a training run: how well steps are foreseen, and where their time goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from capo.lab.config import Config

if TYPE_CHECKING:
    from torch import Tensor

    from capo.core.trust_region import Probe
    from capo.integrations._trl_sample import Sample

Rows = list[dict[str, Any]]

OWN = "m_F, own step"
FORESEEN = {
    "head, sampled": "½ s² of the real step, last layer",
    "head": "½ Var(u) of the real step, last layer",
    "deep": "½ Var(u) of the real step, all layers",
}
PROXIES = ("surprise", "entropy", "gap", "advantage")


def fidelity(config: Config, output: Path) -> Rows:
    """Train, and before every step ask each predictor and proxy what it will do to every token.

    The truth is the exact KL of the step on the tokens of its batch.

    Returns:
        per step: ``step``, ``truth`` (mean KL, nats), by predictor ``token`` (Spearman with the token's
        KL) and ``batch`` (its mean over the tokens).
    """
    from capo.integrations._trl_judge import Judge, Verdict
    from capo.lab.bench_fidelity import comparing, spearman
    from capo.lab.run import train

    seen: list[Verdict] = []
    judge = Judge.judge

    def noting(self: Judge, *args: Any, **kwargs: Any) -> Verdict:
        verdict = judge(self, *args, **kwargs)
        seen[:] = [verdict]
        return verdict

    def compare(probe: Probe, sample: Sample, _: Any) -> dict[str, Any]:
        truth = probe.after(1.0)
        found = _predictions(probe, sample)
        if seen:
            own = seen[0].curvature.policy_shift[sample.rows]
            found[OWN] = sample.at_tokens(own[:, : sample.mask.size(1)])
        return {
            "truth": probe.mean(truth).policy,
            "token": {name: spearman(v, truth.policy_shift) for name, v in found.items()},
            "batch": {name: float(v.double().mean()) for name, v in found.items()},
        }

    with patch.object(Judge, "judge", noting), comparing(compare) as rows:
        train(config, output, overwrite=True)
    return [{"step": step, **row} for step, row in enumerate(rows, start=1)]


def _predictions(probe: Probe, sample: Sample) -> dict[str, Tensor]:
    head, deep = probe.along(0), probe.along("all")
    log_probs = probe.reference.log_probs
    log_prob = log_probs.gather(1, probe.reference.token_ids[:, None])[:, 0]
    size = probe.reference.advantages.abs()
    return {
        "head, sampled": 0.5 * head.log_ratio.square(),
        "head": head.policy_shift,
        "deep": deep.policy_shift,
        "surprise": -log_prob,
        "entropy": -(log_probs.exp() * log_probs).sum(-1),
        "gap": size * -log_prob.expm1(),
        "advantage": size,
    }


@dataclass
class Clock:
    """CPU seconds by what they went into; what runs within something else is taken off that."""

    spent: dict[str, float] = field(default_factory=dict)
    _open: list[list[Any]] = field(default_factory=list)

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Count what happens under ``name``."""
        frame = [time.process_time(), 0.0]
        self._open.append(frame)
        try:
            yield
        finally:
            self._open.pop()
            whole = time.process_time() - frame[0]
            self.spent[name] = self.spent.get(name, 0.0) + whole - frame[1]
            if self._open:
                self._open[-1][1] += whole

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, counted under ``name``."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.within(name):
                return function(*args, **kwargs)

        return call


GENERATION, JUDGING, MOMENTS = "generation and rewards", "curvature and selection", "moments"
BATCH, MEASURING, EVALUATION = "shift of the batch", "measuring the step", "evaluation"
REST = "loss, backward pass and optimizer"
PARTS = (GENERATION, JUDGING, MOMENTS, BATCH, MEASURING, REST)


def cost(config: Config, output: Path) -> Rows:
    """Train, and take the CPU time of every part of a step.

    Returns:
        per step: ``step`` and the CPU seconds of each of `PARTS`.
    """
    from trl import GRPOTrainer

    from capo.integrations._trl_judge import Judge
    from capo.integrations._trl_step import StepModel
    from capo.integrations._trl_trust import StepControl
    from capo.lab.recorder import Recorder
    from capo.lab.run import train

    clock, rows = Clock(), []
    began = [time.process_time()]
    log = Recorder.on_log

    def logged(
        self: Recorder, args: Any, state: Any, control: Any, logs: Any = None, **k: Any
    ) -> None:
        log(self, args, state, control, logs, **k)
        if logs and "train_runtime" not in logs:
            now = time.process_time()
            spent = {name: clock.spent.get(name, 0.0) for name in (*PARTS[:-1], EVALUATION)}
            rest = now - began[0] - sum(spent.values())
            evaluated = spent.pop(EVALUATION)
            del evaluated  # no part of a step
            rows.append({"step": state.global_step, **spent, REST: rest})
        began[0] = time.process_time()
        clock.spent.clear()

    parts: list[tuple[Any, str, str]] = [
        (GRPOTrainer, "_generate_and_score_completions", GENERATION),
        (Judge, "judge", JUDGING),
        (Judge, "batch_shifts", BATCH),
        (StepModel, "accumulate", MOMENTS),
        (StepModel, "advance", MOMENTS),
        (StepControl, "collect", MEASURING),
        (StepControl, "before_step", MEASURING),
        (StepControl, "after_step", MEASURING),
        (Recorder, "_evaluate", EVALUATION),
    ]
    with ExitStack() as stack:
        for owner, name, label in parts:
            timed = clock.timed(label, getattr(owner, name))
            stack.enter_context(patch.object(owner, name, _method(timed)))
        stack.enter_context(patch.object(Recorder, "on_log", logged))
        train(config, output, overwrite=True)
    return rows


def _method(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    return method


MEASURES: dict[str, Callable[[Config, Path], Rows]] = {"fidelity": fidelity, "cost": cost}
"""What a grid's ``measure`` can name, besides ``runs``."""
