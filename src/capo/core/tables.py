"""Settings in nested tables, as TOML has them."""

from __future__ import annotations

from typing import Any


def laid_over(base: dict[str, Any], update: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``update`` over it, table by table: what ``update`` does not name stays."""
    merged = dict(base)
    for key, value in update.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            merged[key] = laid_over(base[key], value)
        else:
            merged[key] = value
    return merged
