"""The integrations' tests: warnings of others are let pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from trl_warnings import THIRD_PARTY


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            for entry in THIRD_PARTY:
                item.add_marker(pytest.mark.filterwarnings(entry))
