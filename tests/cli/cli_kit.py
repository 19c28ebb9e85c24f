"""What a command asks the library for, without the library's doing it."""

from __future__ import annotations

import pytest


class Asked(Exception):  # noqa: N818 - stops a command once it has asked
    """What a command has asked the library for."""


def asks(*arguments, **_):
    raise Asked(*arguments)


def asked(run_capo, *arguments):
    """What the first argument of the function that raises `Asked` was, and those after it."""
    with pytest.raises(Asked) as stopped:
        run_capo(*arguments)
    return stopped.value.args
