"""Worker processes that make the runs, and the driver that feeds them from the study's parts."""

from __future__ import annotations

import contextlib
import fnmatch
import gc
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Protocol

from capo.lab.study.jobs import Job
from capo.lab.study.outcome import Outcome, Store
from capo.lab.study.stages import Incomplete, Stage


class Runner(Protocol):
    """Makes runs, in whatever order suits it."""

    def submit(self, job: Job) -> None:
        """Make this run some time."""

    def finished(self) -> list[tuple[Job, Outcome]]:
        """Runs that are made; waits for at least one. Empty where none was submitted."""


class Workers:
    """Processes that keep torch and transformers imported and make one run after another."""

    def __init__(self, jobs: int, provenance: dict[str, Any]) -> None:
        """Start nothing before there is something to do."""
        os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to come; torch here has started
        self.provenance = provenance
        self.pool = ProcessPoolExecutor(
            jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_begin
        )
        self.running: dict[Future[Outcome], Job] = {}

    def submit(self, job: Job) -> None:
        """See `Runner.submit`."""
        self.running[self.pool.submit(_execute, job, self.provenance)] = job

    def finished(self) -> list[tuple[Job, Outcome]]:
        """See `Runner.finished`.

        Raises:
            Exception: whatever a run raised, with a note that says which.
        """
        done = wait(self.running, return_when=FIRST_COMPLETED).done
        made = []
        for future in done:
            job = self.running.pop(future)
            try:
                made.append((job, future.result()))
            except Exception as error:
                error.add_note(f"in the run {job.path} of the study")
                raise
        return made

    def stop(self) -> None:
        """End the processes, whatever they are at."""
        processes = list((self.pool._processes or {}).values())
        self.pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()


@contextlib.contextmanager
def workers(jobs: int, provenance: dict[str, Any]) -> Iterator[Workers]:
    """`Workers` that are gone afterwards, however it ends."""
    made = Workers(jobs, provenance)
    try:
        yield made
    finally:
        made.stop()


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's business
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore", FutureWarning)


def _end_with_parent() -> None:
    """A parent that was killed stops nobody: without this, its workers would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _execute(job: Job, provenance: dict[str, Any]) -> Outcome:
    from capo.lab.study.execute import execute

    outcome = execute(job, provenance)
    gc.collect()  # a trainer is a knot of references
    return outcome


@dataclass
class Driver:
    """Feeds a runner from several parts at once, and each part with its outcomes.

    Attributes:
        store: where finished runs are found and left.
        runner: makes those that are missing; None: nobody does.
        only: glob on ``STAGE/ARM``: no other run is made.
        heard: called with every run that was made.
    """

    store: Store
    runner: Runner | None
    only: str = "*"
    heard: Callable[[Job, Outcome], None] = lambda job, outcome: None
    _known: dict[str, Outcome] = field(default_factory=dict)
    _waiting: set[str] = field(default_factory=set)

    def __call__(self, parts: Mapping[str, Stage[Any]]) -> dict[str, Any]:
        """Run the parts to their ends.

        Returns:
            the result of each part, None where a run that it depends on is missing.
        """
        results: dict[str, Any] = dict.fromkeys(parts)
        asked: dict[str, list[Job]] = {}
        for name, part in parts.items():
            self._resume(name, part, None, asked, results)
        while True:
            ready = [name for name, jobs in asked.items() if not self._pending(jobs)]
            for name in ready:
                outcomes = [self._known.get(job.path) for job in asked.pop(name)]
                self._resume(name, parts[name], outcomes, asked, results)
            if ready:
                continue
            if not asked:
                return results
            assert self.runner is not None, "nothing is waited for that nobody makes"
            for job, outcome in self.runner.finished():
                self.store.save(outcome)
                self._known[job.path] = outcome
                self._waiting.discard(job.path)
                self.heard(job, outcome)

    @property
    def known(self) -> list[Outcome]:
        """All outcomes that the parts have asked for and got."""
        return list(self._known.values())

    def _resume(
        self,
        name: str,
        part: Stage[Any],
        outcomes: list[Outcome | None] | None,
        asked: dict[str, list[Job]],
        results: dict[str, Any],
    ) -> None:
        try:
            jobs = next(part) if outcomes is None else part.send(outcomes)
        except StopIteration as end:
            results[name] = end.value
        except Incomplete:
            pass
        else:
            asked[name] = jobs
            for job in jobs:
                self._want(job)

    def _want(self, job: Job) -> None:
        if job.path in self._known or job.path in self._waiting:
            return
        outcome = self.store.load(job)
        if outcome is not None:
            self._known[job.path] = outcome
        elif self.runner is not None and fnmatch.fnmatchcase(job.arm.path, self.only):
            self._waiting.add(job.path)
            self.runner.submit(job)

    def _pending(self, jobs: list[Job]) -> bool:
        return any(job.path in self._waiting for job in jobs)
