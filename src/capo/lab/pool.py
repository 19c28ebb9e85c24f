"""Worker processes that keep torch and transformers imported and make one thing after another."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

JobT = TypeVar("JobT")
MadeT = TypeVar("MadeT")

ATTEMPTS = 2  # at a job whose process died: the second time it was hardly another job's doing


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

    Args:
        jobs: processes.
        make: called in a process with a job, with ``extra`` after it; importable by its name.
        extra: further arguments, the same for every job.
    """

    def __init__(self, jobs: int, make: Callable[..., MadeT], *extra: Any) -> None:
        """Start nothing before there is something to do."""
        os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to come; torch here has started
        self.jobs, self.make, self.extra = jobs, make, extra
        self.pool = self._pool()
        self.running: dict[Future[MadeT], tuple[JobT, int]] = {}

    def submit(self, job: JobT) -> None:
        """Make this some time."""
        self._submit(job, attempt=1)

    def finished(self, timeout: float | None = None) -> list[tuple[JobT, MadeT | Failure]]:
        """What is made by now; waits for at least one, but no longer than ``timeout`` seconds.

        Empty where nothing was submitted, or nothing is made in time.
        """
        done = wait(self.running, timeout=timeout, return_when=FIRST_COMPLETED).done
        made: list[tuple[JobT, MadeT | Failure]] = []
        again: list[tuple[JobT, int]] = []
        for future in done:
            job, attempt = self.running.pop(future)
            try:
                made.append((job, future.result()))
            except BrokenProcessPool as error:
                # One process died and took the pool with it: which job's it was, nobody knows.
                if attempt < ATTEMPTS:
                    again.append((job, attempt + 1))
                else:
                    made.append((job, Failure(error)))
            except Exception as error:
                made.append((job, Failure(error)))
        if again:
            self._again(again)
        return made

    def stop(self) -> None:
        """End the processes, whatever they are at."""
        processes = list((self.pool._processes or {}).values())
        manager: Any = self.pool._executor_manager_thread  # a thread, which shutdown forgets
        self.pool.shutdown(wait=False, cancel_futures=True)
        for process in processes if self.running else []:  # the others have nothing to do and leave
            process.terminate()
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
        if manager is not None:  # else it may close its pipe while Python, at exit, writes to it
            manager.join(timeout=10)

    def _submit(self, job: JobT, attempt: int) -> None:
        future = self.pool.submit(_call, self.make, job, *self.extra)
        self.running[future] = (job, attempt)

    def _again(self, jobs: list[tuple[JobT, int]]) -> None:
        # The pool is broken, so everything else in it is lost as well, and was as innocent.
        jobs += self.running.values()
        self.running.clear()
        self.stop()
        self.pool = self._pool()
        for job, attempt in jobs:
            self._submit(job, attempt)

    def _pool(self) -> ProcessPoolExecutor:
        spawn = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self.jobs, mp_context=spawn, initializer=begin_worker)


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
