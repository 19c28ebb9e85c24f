"""The command line, called in the test's own process."""

from __future__ import annotations

import sys

import pytest

from capo.cli.main import main


@pytest.fixture
def run_capo(monkeypatch, capsys):
    """Calls the command in this process; returns its exit code, stdout and stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["capo", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            main()
        printed = capsys.readouterr()
        return exited.value.code or 0, printed.out, printed.err

    return call
