"""Shared by every test: one thread (the suite runs in parallel), and a seed."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(20251000)


@pytest.fixture
def generator() -> torch.Generator:
    """A generator of the test's own."""
    return torch.Generator().manual_seed(819)
