"""Shared by every test: one thread a process, as the suite runs in parallel; interrupts; a seed."""

from __future__ import annotations

import os
import signal

import pytest

# Of torch here, and of every process that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)  # where a plug-in has imported it before

# A shell starts its background jobs with SIGINT ignored, and what they start inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(20251000)


@pytest.fixture
def generator() -> torch.Generator:
    """A generator of the test's own."""
    return torch.Generator().manual_seed(819)
