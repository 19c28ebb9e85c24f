"""Where a run came from: versions, commit, dirty diff, hardware, command."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import capo

PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "numpy", "safetensors")


def collect_provenance(started: datetime | None = None) -> dict[str, Any]:
    """Everything about this process that another needs in order to repeat it.

    The machine's name and the user's are left out on purpose: runs are for sharing.
    """
    started = started or datetime.now(UTC)
    return {
        "capo_version": capo.__version__,
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain")),
        "hardware": _hardware(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": started.isoformat(timespec="seconds"),
    }


def dirty_diff() -> str:
    """What the checkout differs by from its commit, ``""`` where it does not or is no checkout."""
    return _git("diff", "HEAD") or ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Ask git about the checkout this package runs from; None where it is an installed wheel."""
    package = Path(__file__).resolve().parent
    if "site-packages" in package.parts:  # the surrounding checkout would be somebody else's
        return None
    try:
        answer = subprocess.run(
            ["git", "-C", str(package), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _hardware() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_name(),
        "cores": cores(),
        "memory_gb": round(memory / 2**30, 1),
        "gpu": ", ".join(gpus) or None,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
