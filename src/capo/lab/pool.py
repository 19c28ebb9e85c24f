"""Worker processes that keep torch and transformers imported and make one thing after another."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

JobT = TypeVar("JobT")
MadeT = TypeVar("MadeT")


@dataclass(frozen=True)
class Failure:
    """A job that raised, or whose process died twice."""

    error: BaseException

    @property
    def message(self) -> str:
        """One line."""
        first = (str(self.error).strip().splitlines() or [""])[0]
        return f"{type(self.error).__name__}: {first}"


class Workers(Generic[JobT, MadeT]):
    """A bounded number of processes.

    Each is a pool of its own, so that one that dies takes no other's job with it. Its job is tried once
    more, at the end and alone: what had no memory beside the others may have it then.

    Args:
        jobs: processes.
        make: called in a process with a job, with ``extra`` after it; importable by its name.
        extra: further arguments, the same for every job.
    """

    def __init__(self, jobs: int, make: Callable[..., MadeT], *extra: Any) -> None:
        """Start nothing before there is something to do."""
        os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to come; torch here has started
        self.jobs, self.make, self.extra = jobs, make, extra
        self._processes: list[ProcessPoolExecutor] = []
        self._idle: list[ProcessPoolExecutor] = []  # of them
        self._at_work: dict[Future[MadeT], tuple[JobT, ProcessPoolExecutor]] = {}
        self._waiting: deque[JobT] = deque()
        self._died: deque[JobT] = deque()  # their processes did, once
        self._alone = False  # whether one of those is at work

    @property
    def running(self) -> int:
        """Jobs of which `finished` has still to tell, begun or not."""
        return len(self._waiting) + len(self._at_work) + len(self._died)

    def submit(self, job: JobT) -> None:
        """Make this some time."""
        self._waiting.append(job)
        self._begin_some()

    def finished(self, timeout: float | None = None) -> list[tuple[JobT, MadeT | Failure]]:
        """What is made by now; waits for at least one, but no longer than ``timeout`` seconds.

        Empty where nothing was submitted, nothing is made in time, or a process died.
        """
        done = wait(self._at_work, timeout=timeout, return_when=FIRST_COMPLETED).done
        made: list[tuple[JobT, MadeT | Failure]] = []
        for future in done:
            job, process = self._at_work.pop(future)
            try:
                made.append((job, future.result()))
            except BrokenProcessPool as error:
                self._end([process], at_once=True)
                if self._alone:
                    made.append((job, Failure(error)))
                else:
                    self._died.append(job)
                continue
            except Exception as error:
                made.append((job, Failure(error)))
            self._idle.append(process)
        self._alone = self._alone and bool(self._at_work)
        self._begin_some()
        return made

    def stop(self) -> None:
        """End the processes, whatever they are at."""
        self._end([each for each in self._processes if each not in self._idle], at_once=True)
        self._end(self._idle)

    def _begin_some(self) -> None:
        while self._waiting and len(self._at_work) < self.jobs and not self._alone:
            self._begin(self._waiting.popleft())
        if self._died and not self._at_work:
            self._end(self._idle)  # the memory is for the one
            self._alone = True
            self._begin(self._died.popleft())

    def _begin(self, job: JobT) -> None:
        process = self._idle.pop() if self._idle else self._process()
        try:
            future = process.submit(_call, self.make, job, *self.extra)
        except BrokenProcessPool:  # it died with nothing to do, which is no fault of this job
            self._end([process], at_once=True)
            process = self._process()
            future = process.submit(_call, self.make, job, *self.extra)
        self._at_work[future] = (job, process)

    def _process(self) -> ProcessPoolExecutor:
        """One process, started with its first job."""
        spawn = multiprocessing.get_context("spawn")
        process = ProcessPoolExecutor(1, mp_context=spawn, initializer=begin_worker)
        self._processes.append(process)
        return process

    def _end(self, pools: Sequence[ProcessPoolExecutor], *, at_once: bool = False) -> None:
        """End these processes; without ``at_once`` they have nothing to do, and leave by themselves."""
        processes = [
            process for pool in pools for process in list((pool._processes or {}).values())
        ]
        managers: list[Any] = [pool._executor_manager_thread for pool in pools]  # shutdown forgets
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)
        for process in processes if at_once else []:
            process.terminate()
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
        for (
            manager
        ) in managers:  # one that is left may close its pipe while Python, at exit, writes to it
            if manager is not None:
                manager.join(timeout=10)
        self._processes = [each for each in self._processes if each not in pools]
        self._idle = [each for each in self._idle if each not in pools]


@contextlib.contextmanager
def working(jobs: int, make: Callable[..., MadeT], *extra: Any) -> Iterator[Workers[Any, MadeT]]:
    """`Workers` that are gone afterwards, however it ends; SIGTERM ends it as an interrupt does."""
    with _termination_interrupts():
        made: Workers[Any, MadeT] = Workers(jobs, make, *extra)
        try:
            yield made
        finally:
            made.stop()


@contextlib.contextmanager
def _termination_interrupts() -> Iterator[None]:
    # By default Python dies of it where it stands: nothing is said, and the pool's semaphores stay behind.
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def begin_worker() -> None:
    """Leave interrupts to the parent, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's business
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore", FutureWarning)


def _end_with_parent() -> None:
    """A parent that was killed stops nobody: without this, its workers would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(make: Callable[..., MadeT], job: Any, *extra: Any) -> MadeT:
    made = make(job, *extra)
    gc.collect()  # a trainer is a knot of references
    return made
