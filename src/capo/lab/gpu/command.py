"""Check, then measure, on a GPU: the core at a 7 B model's head, update steps of 1.5 B and 7 B policies.

    capo bench gpu [--quick] [--output DIR]          (or: benchmarks/gpu.sh)

Every stage is a process of its own with a time limit, and writes its record as it goes. The checks come
first: the fused backend against float64, and a memory checker where one is installed. Where they are red
nothing is timed. Without a GPU this is a dry run at tiny sizes, the kernels interpreted: it shows that
every part works, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from capo.lab.gpu.report import DRY, table, write_report
from capo.lab.gpu.sizes import sizes_of
from capo.lab.gpu.timing import Record

SUITE = Path("tests/core/triton_suite.py")
LIMITS = {"checks": 90, "suite": 120, "memory": 60, "core": 100, "step0": 135, "step1": 155}
"""Seconds a stage may take. The checks run at once, the others one after the other: at most 510 s in all.

On an H200 with other work on its host: checks 80, core 70, a cycle of the 7 B step 85. A stage ends itself
before its limit (``Policy.seconds``) and keeps what it has; ``--only`` runs one, into the same directory.
"""


@dataclass
class Job:
    """A stage's process."""

    name: str
    process: subprocess.Popen[str]
    log: Path
    started: float
    limit: float

    def wait(self) -> int:
        """Its exit status; 124 where it ran out of time."""
        try:
            self.process.wait(max(0.1, self.limit - (time.monotonic() - self.started)))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return 124
        return self.process.returncode


class Stages:
    """Starts stages and says how they went.

    Args:
        scale: ``"full"``, ``"quick"`` or ``"tiny"``.
        output: where records and logs go.
    """

    def __init__(self, scale: str, output: Path) -> None:
        self.scale, self.output = scale, output
        self.environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        if scale == "tiny":
            self.environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}

    def start(self, name: str, command: list[str], **environment: str) -> Job:
        """Start a command as a stage, its output in a log."""
        log = self.output / "logs" / f"{name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        limit = LIMITS[name] * (6 if self.scale == "tiny" else 1)  # an interpreter is slow
        with log.open("w") as stream:
            process = subprocess.Popen(
                command,
                stdout=stream,
                stderr=subprocess.STDOUT,
                text=True,
                env=self.environment | environment,
            )
        return Job(name, process, log, time.monotonic(), limit)

    def stage(self, name: str) -> Job:
        """Start one of `capo.lab.gpu.stage`'s."""
        path = str(self.output / f"{name}.json")
        return self.start(
            name, [sys.executable, "-m", "capo.lab.gpu.stage", name, self.scale, path]
        )

    def finish(self, job: Job, lines: int = 0) -> int:
        """Wait, and print the status and the end of the log (more of it where it failed)."""
        status = job.wait()
        took = time.monotonic() - job.started
        said = {0: "done", 124: "OUT OF TIME"}.get(status, f"FAILED ({status})")
        print(f"[{took:5.1f} s] {job.name}: {said}", flush=True)
        text = job.log.read_text(errors="replace").splitlines()
        for line in text[-(40 if status else lines) :] if status or lines else []:
            print(f"    {line}", flush=True)
        return status

    def check(self) -> bool:
        """Run all checks at once; whether none is red. What is not installed is said so."""
        jobs = [self.stage("checks")]
        suite = self._suite()
        if suite is not None:
            jobs.append(suite)
        record = Record(self.output / "verdict.json", stage="verdict", scale=self.scale)
        memory = self._memory()
        verdict = {job.name: _said(self.finish(job)) for job in jobs}
        verdict["suite"] = verdict.get("suite", "not run: pytest or the tests are not here")
        verdict["memory checker"] = "not run: compute-sanitizer is not installed"
        if self.scale == "tiny":
            verdict["memory checker"] = "not run: no GPU"
        elif memory is not None:
            status = self.finish(memory, 3)
            verdict["memory checker"] = _memory_verdict(
                status, memory.log.read_text(errors="replace")
            )
        for name, value in verdict.items():
            record.add(name, value)
        record.finish()
        # A checker that is slow says nothing about the kernels; one that found something does.
        return not any(value.startswith(("red", "out of")) for value in verdict.values())

    def _suite(self) -> Job | None:
        if not SUITE.exists() or find_spec("pytest") is None or find_spec("pytest_timeout") is None:
            return None
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        workers = min(12, (os.cpu_count() or 2) - 1)
        if self.scale != "tiny" and find_spec("xdist") is not None and workers > 1:
            command += ["-n", str(workers)]
        command += ["-o", "filterwarnings=default", "--timeout=90", str(SUITE)]
        interpret = "1" if self.scale == "tiny" else "0"
        return self.start(
            "suite",
            [*command, *sizes_of(self.scale).suite],
            TRITON_INTERPRET=interpret,
            TRITON_CACHE_DIR=tempfile.mkdtemp(prefix="capo-triton-"),
        )

    def _memory(self) -> Job | None:
        checker = shutil.which("compute-sanitizer") or _cuda_binary("compute-sanitizer")
        if self.scale == "tiny" or checker is None:
            return None
        command = [
            checker,
            "--tool",
            "memcheck",
            "--report-api-errors",
            "no",
            "--error-exitcode",
            "9",
        ]
        stage = [sys.executable, "-m", "capo.lab.gpu.stage", "small", self.scale, "-"]
        # Without torch's cache every tensor is an allocation of its own, which the checker can tell apart.
        return self.start("memory", [*command, *stage], PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def _memory_verdict(status: int, log: str) -> str:
    """Only what the checker itself found is red: that it is slow or does not run here says nothing."""
    found = re.search(r"ERROR SUMMARY: (\d+) error", log)
    if status == 124:
        return "not run: not finished in time"
    if found is None:
        return f"not run: compute-sanitizer stopped (exit {status})"
    return "green" if found[1] == "0" and status == 0 else f"red ({found[1]} errors, exit {status})"


def _said(status: int) -> str:
    return {0: "green", 124: "out of time"}.get(status, f"red (exit {status})")


def _cuda_binary(name: str) -> str | None:
    path = Path("/usr/local/cuda/bin") / name
    return str(path) if path.exists() else None


def run(scale: str, output: Path, only: list[str] | None = None) -> int:
    """All stages; 1 where a check is red or a stage left something out."""
    print(f"capo bench gpu, {scale}" + (f"\n{DRY}" if scale == "tiny" else ""), flush=True)
    stages = Stages(scale, output)
    names = ["core", *(f"step{i}" for i in range(len(sizes_of(scale).policies)))]
    chosen = only or ["checks", *names]
    if "checks" in chosen and not stages.check():
        print("A check is red: no figure was taken.", flush=True)
        return 1
    chosen = [name for name in names if name in chosen]
    if scale == "quick":  # a trial: no figure counts, so that all stages may run at once
        started = [stages.stage(name) for name in chosen]
        failed = [job.name for job in started if stages.finish(job, 30)]
    else:
        failed = [name for name in chosen if stages.finish(stages.stage(name), 30)]
    write_report(output)
    print(f"\n{table(output)}\n\nwritten to {output}", flush=True)
    return 1 if failed else 0


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``capo bench gpu``."""
    parser = argparse.ArgumentParser(
        prog="capo bench gpu", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="one small point of every stage")
    parser.add_argument("--tiny", action="store_true", help="dry run (always without a GPU)")
    parser.add_argument(
        "--only",
        action="append",
        choices=["checks", "core", "step0", "step1"],
        help="this stage; may be given again",
    )
    parser.add_argument("--report", action="store_true", help="only write the report anew")
    parser.add_argument("--output", type=Path, default=None, help="directory")
    options = parser.parse_args(arguments)
    import torch

    tiny = options.tiny or not torch.cuda.is_available()
    scale = "tiny" if tiny else "quick" if options.quick else "full"
    output = options.output or Path("results/gpu" if scale == "full" else f"runs/gpu-{scale}")
    if options.report:
        output = options.output or Path("results/gpu")
        write_report(output)
        print(table(output))
        return
    if status := run(scale, output, options.only):
        raise SystemExit(status)


if __name__ == "__main__":
    main()
