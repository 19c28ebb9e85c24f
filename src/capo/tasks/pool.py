"""Grading in processes of its own: bounded in time, restarted where it dies, gone with its parent.

The workers (`capo.tasks.worker`) are started afresh by an interpreter of their own, never forked
from a process with torch's threads, and never import the caller's main module. They end when their
standard input does, so they cannot outlive their parent.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from capo.core.errors import InputError
from capo.tasks.worker import GRACE

TIME_LIMIT = 3.0  # CPU seconds a completion
START_LIMIT = 300.0  # seconds that a worker may take to import what it grades with
LONGEST = 1 << 16  # characters of a completion that travel: the answer is at its end

Job = Mapping[str, Any]


class GradingPool:
    """A few worker processes that grade; started at the first job.

    A job whose grader runs out of time, dies or raises has the reward 0. While one worker is busy
    with such a job the others go on. Safe to use from several threads; after a fork the child has
    workers of its own.

    Args:
        workers: processes, at least 1.
        time_limit: CPU seconds a job may take.

    Raises:
        InputError: an argument out of its range.
    """

    def __init__(self, workers: int = 2, time_limit: float = TIME_LIMIT) -> None:
        if workers < 1:
            raise InputError("workers", f"must be at least 1, got {workers}.")
        if not 0 < time_limit < float("inf"):
            raise InputError("time_limit", f"must be positive and finite, got {time_limit}.")
        self.time_limit = time_limit
        self._workers = [_Worker(time_limit) for _ in range(workers)]
        self._idle = self._queue()
        self._finalizer = weakref.finalize(self, _close, self._workers)
        _POOLS.add(self)

    def grade(self, jobs: Sequence[Job]) -> list[float]:
        """The rewards of ``jobs``, in their order, each in [0, 1].

        Args:
            jobs: JSON objects with a ``kind`` of `capo.tasks.worker.GRADERS`, and what that takes.

        Raises:
            RuntimeError: a worker cannot be started, or cannot import what it grades with.
        """
        if len(jobs) <= 1:
            return [self._one(job) for job in jobs]
        with ThreadPoolExecutor(min(len(self._workers), len(jobs))) as threads:
            return list(threads.map(self._one, jobs))

    def close(self) -> None:
        """End the workers. The next job would start them again."""
        _close(self._workers)

    def _one(self, job: Job) -> float:
        worker = self._idle.get()
        try:
            return worker.grade(job)
        finally:
            self._idle.put(worker)

    def _queue(self) -> queue.LifoQueue[_Worker]:
        idle: queue.LifoQueue[_Worker] = queue.LifoQueue()  # the last used is warm
        for worker in reversed(self._workers):
            idle.put(worker)
        return idle

    def _forked(self) -> None:
        for worker in self._workers:
            worker.forget()
        self._idle = self._queue()


class _Worker:
    """One process, started when there is something to grade."""

    def __init__(self, time_limit: float) -> None:
        self.time_limit = time_limit
        self._process: subprocess.Popen[bytes] | None = None

    def grade(self, job: Job) -> float:
        """The job's reward; 0 if it took the process down with it."""
        line = json.dumps(job).encode() + b"\n"  # pure ASCII, lone surrogates included
        answer = self._ask(line) or self._ask(line)  # a worker that was dead before is no verdict
        if answer is None:
            raise RuntimeError("a grading process ended before it had begun to grade")
        if answer.startswith("failed"):
            raise RuntimeError(f"grading {answer}")
        return float(answer)

    def stop(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is None or process.stdin is None or process.stdout is None:
            return
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.kill()
        process.wait()
        process.stdout.close()

    def forget(self) -> None:
        """In a forked child: let go of the parent's process without touching it."""
        process, self._process = self._process, None
        if process is not None and process.stdin is not None and process.stdout is not None:
            process.returncode = 0  # nothing of ours to wait for
            for stream in (process.stdin, process.stdout):
                stream.close()  # unbuffered: nothing is sent

    def _ask(self, line: bytes) -> str | None:
        """The worker's answer; None if it died before it began."""
        try:
            return self._exchange(line)
        except BaseException:  # an interrupt, say: the answer that is on its way is no later job's
            self.stop()
            raise

    def _exchange(self, line: bytes) -> str | None:
        process = self._process or self._start()
        begun = self._reply(START_LIMIT) if self._send(process, line) else None
        if begun is None:
            self.stop()
            return None
        if begun != "begun":
            return begun
        # The worker minds its CPU seconds itself. This is for one that is stopped or swaps.
        verdict = self._reply(4 * (self.time_limit + GRACE) + 10)
        if verdict is None:
            self.stop()
            return "0.0"
        return verdict

    def _start(self) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).parents[2])  # the worker must find this very package
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "capo.tasks.worker", str(self.time_limit)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        return self._process

    def _send(self, process: subprocess.Popen[bytes], line: bytes) -> bool:
        """Whether the worker took the whole line."""
        assert process.stdin is not None
        deadline = time.monotonic() + START_LIMIT
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdin, selectors.EVENT_WRITE)
            while line:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return False
                try:
                    line = line[os.write(process.stdin.fileno(), line) :]
                except BrokenPipeError:
                    return False
        return True

    def _reply(self, seconds: float) -> str | None:
        """The next line; None if the process ends or ``seconds`` pass first."""
        assert self._process is not None
        assert self._process.stdout is not None
        stream, deadline, text = self._process.stdout, time.monotonic() + seconds, b""
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            while not text.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                byte = os.read(stream.fileno(), 1)  # what follows the line is the next reply's
                if not byte:
                    return None
                text += byte
        return text.decode().strip()


def shared_pool() -> GradingPool:
    """The pool of this process, for every task: a worker a core, two at least and four at most."""
    global _shared  # noqa: PLW0603
    with _lock:
        if _shared is None:
            _shared = GradingPool(workers=min(max(2, os.cpu_count() or 2), 4))
        return _shared


def _close(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.stop()


def _after_fork() -> None:
    global _lock  # noqa: PLW0603
    _lock = threading.Lock()  # another thread of the parent may have held it
    for pool in list(_POOLS):
        pool._forked()


_shared: GradingPool | None = None
_lock = threading.Lock()
_POOLS: weakref.WeakSet[GradingPool] = weakref.WeakSet()
os.register_at_fork(after_in_child=_after_fork)
