"""The documentation's tests: warnings of others are let pass, for TRL trains in some of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from trl_warnings import THIRD_PARTY

TRL_DEFAULTS = (
    "ignore:`gradient_checkpointing:FutureWarning",
    "ignore:'pin_memory' argument is set as true:UserWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            for entry in (*THIRD_PARTY, *TRL_DEFAULTS):
                item.add_marker(pytest.mark.filterwarnings(entry))
