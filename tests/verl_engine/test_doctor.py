"""``capo doctor`` where verl is installed: the plug-in is found to be taken, and said so where it is not."""

from __future__ import annotations

import pytest

from capo.doctor import Finding, examine
from capo.doctor.plan import plan


def verl() -> Finding:
    wanted = [each for each in plan() if each.section == "engines" and each.name == "verl"]
    (found,) = examine(wanted=wanted)
    return found


def test_the_engine_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VERL_ENGINE_VENDOR", raising=False)
    found = verl()
    assert found.state == "ok", found
    assert found.found.endswith("where VERL_ENGINE_VENDOR=capo, which is not set in this shell")


def test_a_plug_in_that_verl_does_not_load_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "none")
    found = verl()
    assert found.state == "broken"
    assert "it loaded no plug-in (VERL_USE_EXTERNAL_PLUGINS=none)" in found.found
