"""Programs of the machine that some tests need."""

from __future__ import annotations

import os
import shutil

import pytest

CI = bool(os.environ.get("CI"))  # where nothing may be missing


def needed(program: str, package: str | None = None) -> str:
    """The program's path. Where it is missing the test is skipped, but fails in CI.

    Args:
        program: its name.
        package: what installs it, where that has another name.
    """
    path = shutil.which(program)
    if path is None:
        message = f"this test needs {program} (apt install {package or program})"
        pytest.fail(message) if CI else pytest.skip(message)
    return path
