"""The diff by which a TRL script becomes one with CAPO: both sides are scripts, and every name is there."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
from typing import Any

import pytest
from trl import GRPOTrainer

from docs.doc_blocks import ROOT


def sides() -> dict[str, ast.Module]:
    page = (ROOT / "docs" / "distributed.md").read_text()
    (block,) = re.findall(r"```diff\n(.*?)```", page, flags=re.DOTALL)
    lines = block.splitlines()
    assert {line[0] for line in lines if line} == {"+", "-", " "}
    old = "\n".join(line[1:] for line in lines if not line.startswith("+"))
    new = "\n".join(line[1:] for line in lines if not line.startswith("-"))
    return {"old": ast.parse(old), "new": ast.parse(new)}


def named(script: ast.Module) -> dict[str, Any]:
    """What a script imports."""
    return {
        alias.name: getattr(importlib.import_module(node.module or ""), alias.name)
        for node in ast.walk(script)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


@pytest.mark.parametrize("side", ["old", "new"])
def test_both_sides_call_what_there_is(side: str) -> None:
    script = sides()[side]
    found = named(script)
    assert (
        set(found)
        == {"old": {"GRPOConfig", "GRPOTrainer"}, "new": {"CAPOConfig", "CAPOTrainer"}}[side]
    )
    calls = [node for node in ast.walk(script) if isinstance(node, ast.Call)]
    used = {c.func.id: [k.arg for k in c.keywords] for c in calls if isinstance(c.func, ast.Name)}
    assert set(used) == set(found)
    for name, arguments in used.items():
        if name.endswith("Config"):
            allowed = {field.name for field in dataclasses.fields(found[name])}
        else:
            allowed = set(inspect.signature(GRPOTrainer).parameters)
        assert set(arguments) <= allowed


def test_the_new_settings_are_taken(tmp_path) -> None:
    """All but the engine, which asks for its package and a launcher."""
    (call,) = [
        node
        for node in ast.walk(sides()["new"])
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "CAPOConfig"
    ]
    settings = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg != "deepspeed"}
    config = named(sides()["new"])["CAPOConfig"](
        **{**settings, "output_dir": str(tmp_path)}, use_cpu=True, bf16=False
    )
    assert config.rule() is None  # masks and the trust region are not to be combined unasked
    assert config.region() is not None
