"""Jobs for worker processes, importable there, and nothing heavy with them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def make(job: int, deadly: tuple[int, ...], folder: Path) -> tuple[int, int]:
    """Note the attempt and square the job; one of the ``deadly`` ends its process, a negative one raises."""
    with (folder / str(job)).open("a") as log:
        log.write("begun\n")
    if job in deadly:
        os._exit(1)
    if job < 0:
        raise ValueError(f"{job} is negative")
    return job**2, os.getpid()


def die_once(job: int, deadly: tuple[int, ...], folder: Path) -> tuple[int, int]:
    """`make`, but the deadly ones are killed at the first attempt only, as by the kernel."""
    if job in deadly and not (folder / str(job)).exists():
        (folder / str(job)).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return make(job, (), folder)


def attempts(job: int, folder: Path) -> int:
    """How often `make` has begun a job."""
    log = folder / str(job)
    return len(log.read_text().splitlines()) if log.exists() else 0


def wait(job: int, folder: Path) -> None:
    """Be at work until ended; the folder has a file with the name of each process that is."""
    (folder / str(os.getpid())).touch()
    time.sleep(600)
