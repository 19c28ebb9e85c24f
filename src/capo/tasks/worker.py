"""The process that grades: one job a line comes in, one verdict a line goes out.

Started by `capo.tasks.pool` as ``python -m capo.tasks.worker LIMIT``; not for use by hand. What keeps a
completion from running code is that graders which evaluate it are given arithmetic only (see
`capo.tasks.inert`). Beside that, whatever a completion says: a job that has used its CPU seconds is
interrupted, and where Python is not reached (one huge integer) the kernel ends the process a second later,
also when the parent is long gone; memory is bounded; and the kernel lets the process write no file and,
unless it is root's, start no other.

While a job runs an audit hook also refuses to write, remove and start things and to open connections. It
is a net under mistakes of the graders' own and no wall: it is made of Python, and code that runs in this
process can reach it, and its own reward as well.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import signal
import sys
import warnings
from typing import Any, Protocol

GRADERS = {"math": "capo.tasks.math_grading", "reasoning_gym": "capo.tasks.reasoning"}
MEMORY = 4 << 30  # bytes of address space
GRACE = 1.0  # CPU seconds between the interruption and the end of the process

_FORBIDDEN = (
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.kill"),
    *("os.killpg", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink"),
    *("os.truncate", "os.chmod", "os.chown", "os.utime", "subprocess.", "socket.", "shutil."),
    *(
        "pty.",
        "ctypes.",
        "sys.addaudithook",
        "sys.settrace",
        "sys.setprofile",
        "urllib.",
        "ftplib.",
    ),
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Grader(Protocol):
    """What a module named in `GRADERS` offers."""

    def prepare_grading(self) -> None:
        """Import and build whatever the first job would else pay for."""

    def grade_job(self, payload: dict[str, Any]) -> float:
        """Return the reward in [0, 1] of one job. May raise: then the reward is 0."""


class OutOfTime(BaseException):
    """The job's CPU seconds are over. Not an Exception, so that no grader swallows it."""


class _Guard:
    """Time, memory and audit of the jobs of this process."""

    def __init__(self, limit: float) -> None:
        self.limit, self.armed = limit, False
        signal.signal(signal.SIGVTALRM, self._interrupt)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process
        sys.addaudithook(self._audit)

    def __enter__(self) -> None:
        # Again and again after the limit, should a bare `except:` swallow the first.
        signal.setitimer(signal.ITIMER_VIRTUAL, self.limit, 0.05)
        signal.setitimer(signal.ITIMER_PROF, self.limit + GRACE)
        self.armed = True

    def __exit__(self, *_: object) -> None:
        self.armed = False  # first: an alarm from here on is ignored
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)

    def _interrupt(self, *_: object) -> None:
        if self.armed:
            raise OutOfTime

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event.startswith(_FORBIDDEN):
            raise PermissionError(event)
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING:
            raise PermissionError(event)


def main() -> None:
    """Grade until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    sys.dont_write_bytecode = True
    warnings.simplefilter("ignore")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what a library prints is no verdict
    _bound(AS=MEMORY, CORE=0)
    guard, prepared = _Guard(float(sys.argv[1])), dict[str, Grader]()
    for line in sys.stdin.buffer:
        try:
            job = json.loads(line)
            kind = job.pop("kind")
            if kind not in prepared:
                grader: Any = importlib.import_module(GRADERS[kind])
                grader.prepare_grading()
                prepared[kind] = grader
                _bound(FSIZE=0, NPROC=0)  # importing may have written caches
        except Exception as error:
            replies.write(f"failed {type(error).__name__}: {error}".replace("\n", " ") + "\n")
            continue
        replies.write("begun\n")
        replies.write(f"{_grade(prepared[kind], job, guard)}\n")


def _grade(grader: Grader, job: dict[str, Any], guard: _Guard) -> float:
    try:
        with guard:
            reward = float(grader.grade_job(job))
        return min(max(reward, 0.0), 1.0) if math.isfinite(reward) else 0.0
    except (Exception, OutOfTime, SystemExit, KeyboardInterrupt):
        return 0.0


def _bound(**limits: int) -> None:
    """Limits that the kernel sees to: no way back, whatever runs here."""
    with contextlib.suppress(ImportError):
        import resource

        for name, most in limits.items():
            with contextlib.suppress(ValueError, OSError):  # lower already
                resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # the parent is gone
        main()
