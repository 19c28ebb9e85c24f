"""Tiny runs of the real thing, for the tests of runs and of the command line."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

from capo.cli.main import main
from capo.lab.config import Config
from capo.lab.progress import Progress
from capo.lab.sources import load_config

TINY = [
    "training.steps=4",
    "training.completions_per_step=16",
    "training.micro_batch=8",
    "training.save_every=2",
    "eval.problems=8",
    "eval.every_completions=32",
]


def tiny(*overrides: str, preset: str = "small-aggressive") -> Config:
    """Four steps of 16 completions."""
    return load_config(preset, [*TINY, *overrides])


def weights(directory: Path) -> bytes:
    """The trained policy's weights, to the bit."""
    return (directory / "final" / "model.safetensors").read_bytes()


class SignalAt(Progress):
    """Sends this process a signal once a step is logged."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self.step, self.number = step, number

    def stepped(self, row):
        if row["step"] == self.step:
            signal.raise_signal(self.number)


def capo_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "capo.cli.main", *arguments]


def here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`capo` in this process, which has everything imported already."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with mock.patch.object(sys, "argv", ["capo", *arguments]):
        try:
            with redirect_stdout(out), redirect_stderr(err):
                main()
        except SystemExit as exited:
            code = int(exited.code or 0)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def start(*arguments: str) -> subprocess.Popen[str]:
    """A real ``capo`` process."""
    return subprocess.Popen(
        capo_command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_lines(path: Path, lines: int, process: subprocess.Popen[str]) -> None:
    """Until ``path`` has so many lines; the process must still be at work then."""
    deadline = time.monotonic() + 120
    while not path.is_file() or len(path.read_text().splitlines()) < lines:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
