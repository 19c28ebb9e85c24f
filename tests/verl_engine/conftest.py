"""verl needs an environment of its own (`make test-verl`); elsewhere there is nothing to collect here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

collect_ignore_glob = [] if importlib.util.find_spec("verl") else ["test_*.py"]

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
    "VERL_PLATFORM": "cpu",
    "VERL_USE_EXTERNAL_MODULES": "verl_engine.cpu_platform",
    "HYDRA_FULL_ERROR": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
LIMIT = 1200  # seconds of one launch: some minutes, more on a busy machine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whichever test comes first waits for the runs that all are about."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.timeout(LIMIT + 300))


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python as a worker of verl would be."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


def torchrun(world: int, folder: Path, *cases: str) -> subprocess.CompletedProcess[str]:
    """Run cases in `world` processes."""
    return python(
        *("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"),
        str(HERE / "worker.py"),
        str(folder),
        *cases,
    )


def succeeded(process: subprocess.CompletedProcess[str]) -> None:
    """Fail with what the process said, unless it ended well."""
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-6000:]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Policies and batch, and room for what the runs leave behind."""
    folder = tmp_path_factory.mktemp("verl")
    script = "import sys; from pathlib import Path; from verl_engine.job import prepare; "
    succeeded(python("-c", script + "prepare(Path(sys.argv[1]))", str(folder)))
    return folder


Run = Callable[[str, int], list[dict[str, Any]]]


@pytest.fixture(scope="session")
def results(folder: Path) -> Run:
    """What a case came to in each of 1 or 2 processes; all cases that end well are run at once."""
    from verl_engine.cases import CASES

    names = [name for name, case in CASES.items() if not case.die and not case.after_death]
    done: set[int] = set()

    def run(name: str, world: int) -> list[dict[str, Any]]:
        if world not in done:
            succeeded(torchrun(world, folder, *names))
            done.add(world)
        return read(folder, name, str(world))

    return run


def read(folder: Path, name: str, how: str) -> list[dict[str, Any]]:
    """What the processes of a run wrote."""
    ranks = 1 if how == "1" else 2
    return [
        torch.load(folder / f"{name}.{how}.{rank}.pt", weights_only=False) for rank in range(ranks)
    ]
