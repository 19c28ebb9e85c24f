"""What the options of the benches have in common."""

from __future__ import annotations

import argparse

from capo.core.errors import InputError


def at_least_one(options: argparse.Namespace, *names: str) -> None:
    """Refuse a number of things that is none.

    Raises:
        InputError: names the option.
    """
    for name in names:
        number = getattr(options, name)
        if number < 1:
            raise InputError(f"--{name}", f"must be at least 1, got {number}.")
