"""The trainer's callback that writes a run down, evaluates it, and stops it when asked."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from capo.lab.config import Config
from capo.lab.evaluate import Evaluation
from capo.lab.ledger import Alarms, Ledger
from capo.lab.progress import Progress
from capo.lab.rundir import RunDirectory

if TYPE_CHECKING:
    from types import FrameType

    from transformers import TrainerControl, TrainerState, TrainingArguments

    from capo.core.diagnoses import Diagnosis
    from capo.core.early_warning import Warned
    from capo.integrations.monitor import CurvatureMonitor
    from capo.lab.records import TokenWriter


@dataclass
class StopRequest:
    """Whether the run is to stop; the step under way is finished first.

    Attributes:
        requested: someone asked for it.
        out_of_time: its wall clock is used up.
    """

    requested: bool = False
    out_of_time: bool = False


@contextmanager
def stop_on_signals(progress: Progress) -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request; a second one is not caught any more."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may set handlers
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(_number: int, _frame: FrameType | None) -> None:
        request.requested = True
        for number, handler in before.items():
            signal.signal(number, handler)
        progress.said("stopping after this step; interrupt again to stop at once")

    for number in before:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_finite(model: torch.nn.Module) -> None:
    """Raise what sampling would: on a GPU that would end in an assertion that leaves the device unusable."""
    weights = [parameter.detach() for parameter in model.parameters()]
    if not bool(torch.nn.utils.get_total_norm(weights).isfinite()):
        raise RuntimeError("the weights are not finite: they make no probability tensor any more")


class Recorder(TrainerCallback):  # type: ignore[misc]
    """Metrics, evaluations, alarms, token records, status and checkpoints' marks of one run."""

    def __init__(
        self,
        config: Config,
        directory: RunDirectory,
        *,
        evaluate: Callable[[], Evaluation],
        progress: Progress,
        stop: StopRequest,
        tokens: TokenWriter | None,
        ledger: Ledger | None = None,
    ) -> None:
        """Continue the clock of a run that was stopped, and the watch for its collapse."""
        self.config = config
        self.directory = directory
        self.evaluate = evaluate
        self.progress = progress
        self.stop = stop
        self.tokens = tokens
        self.monitor: CurvatureMonitor | None = None
        self._told = 0  # of what the monitor has found
        self.alarms = Alarms(config, directory, ledger, progress.warned)
        logged = directory.rows("metrics.jsonl")
        self._seconds_before = float(logged[-1]["seconds"]) if logged else 0.0
        self._started = self._began = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Evaluate the base policy."""
        self.progress.started(self.config, state.global_step)
        self._started = time.monotonic()
        if state.global_step == 0:
            self._evaluate(0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Write the step's tokens, evaluate if it is time, stop if that was asked."""
        step = state.global_step
        if args.device.type == "cuda":
            _check_finite(others["model"])
        if self.tokens is not None:
            self.tokens.flush(step)
        self.stop.out_of_time = step < self.config.steps and self._time_is_over()
        if self._evaluation_due(step) or self.stop.out_of_time:
            self._evaluate(step)
        if self.stop.out_of_time:
            control.should_training_stop = True
        # TRL keeps the completions that it reuses between iterations out of its checkpoints, so a
        # run can only be continued exactly from where new ones are sampled.
        if self.stop.requested and step % self.config.algorithm.num_iterations == 0:
            control.should_save = True
            control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Append the step's line to ``metrics.jsonl``."""
        if not logs or "train_runtime" in logs:  # the trainer's farewell is no step
            return
        row = {**self._position(state.global_step), **logs}
        self.directory.append("metrics.jsonl", row)
        self.directory.set_status("running", state.global_step, self.config.steps)
        self.progress.stepped(row)
        self.alarms.stepped(row)
        if self.monitor is not None:
            found: list[Warned | Diagnosis] = [*self.monitor.warnings, *self.monitor.diagnoses]
            for news in sorted(found, key=lambda each: each.step)[self._told :]:
                self.alarms.told(row, news.step, news.sentence)
            self._told = len(found)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Declare the checkpoint whole: the trainer has written all of it."""
        self.directory.mark_complete(state.global_step)

    def _time_is_over(self) -> bool:
        limit = self.config.run.max_seconds
        used = self._seconds_before + time.monotonic() - self._began
        return limit is not None and used >= limit

    def _evaluation_due(self, step: int) -> bool:
        every = self.config.eval.every_completions
        assert every is not None, "resolved() fills it in"
        now, before = (self.config.completions_after(s) // every for s in (step, step - 1))
        return now > before or step == self.config.steps

    def _evaluate(self, step: int) -> None:
        began = time.monotonic()
        result = self.evaluate()
        row = {
            **self._position(step, at=began),
            "accuracy": result.accuracy,
            "problems": result.problems,
            "stderr": result.stderr,
        }
        self.directory.append("evals.jsonl", row)
        self.progress.evaluated(row)
        self.alarms.evaluated(row)
        self._started += time.monotonic() - began  # `seconds` are of training

    def _position(self, step: int, at: float | None = None) -> dict[str, Any]:
        seconds = (time.monotonic() if at is None else at) - self._started
        return {
            "step": step,
            "completions": self.config.completions_after(step),
            "seconds": round(self._seconds_before + seconds, 3),
        }
