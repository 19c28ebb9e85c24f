"""What makes the study's runs, and the driver that feeds it from the study's parts."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from capo.lab.pool import Failure, Workers, working
from capo.lab.study.jobs import Job
from capo.lab.study.outcome import Outcome, Store
from capo.lab.study.stages import Incomplete, Stage


class Runner(Protocol):
    """Makes runs, in whatever order suits it."""

    def submit(self, job: Job) -> None:
        """Make this run some time."""

    def finished(self) -> list[tuple[Job, Outcome]]:
        """Runs that are made; waits for at least one. Empty where none was submitted."""


class StudyWorkers:
    """`capo.lab.pool.Workers` that make the study's runs; the first failure ends the study.

    Runs that are finished by then are handed over before it is raised, so that they are kept.
    """

    def __init__(self, pool: Workers[Job, Outcome]) -> None:
        """Start nothing."""
        self.pool = pool
        self._failed: BaseException | None = None

    def submit(self, job: Job) -> None:
        """See `Runner.submit`."""
        self.pool.submit(job)

    def finished(self) -> list[tuple[Job, Outcome]]:
        """See `Runner.finished`.

        Raises:
            Exception: whatever a run raised, with a note that says which.
        """
        while True:
            made = []
            for job, outcome in self.pool.finished(None if self._failed is None else 0.0):
                if not isinstance(outcome, Failure):
                    made.append((job, outcome))
                elif self._failed is None:
                    self._failed = outcome.error
                    self._failed.add_note(f"in the run {job.path} of the study")
            if made:
                return made
            if self._failed is not None:
                raise self._failed
            if not self.pool.running:
                return []


@contextlib.contextmanager
def workers(jobs: int, provenance: dict[str, Any]) -> Iterator[StudyWorkers]:
    """`StudyWorkers` that are gone afterwards, however it ends."""
    with working(jobs, _execute, provenance) as pool:
        yield StudyWorkers(pool)


def _execute(job: Job, provenance: dict[str, Any]) -> Outcome:
    from capo.lab.study.execute import execute

    return execute(job, provenance)


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
