"""The core stands on torch and the standard library alone, and ``import capo`` stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import capo.core

CORE = Path(capo.core.__file__).parent
FILES = sorted(CORE.rglob("*.py"))
ALLOWED = {"torch", "capo"} | set(sys.stdlib_module_names)
# An accelerator's compiler may be used where it is installed, never needed.
OPTIONAL = {"triton"}


def runtime_imports(tree: ast.AST) -> list[tuple[str, bool]]:
    """(module, unconditional) for every import outside ``if TYPE_CHECKING:`` blocks."""
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, unconditional: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child, unconditional)
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, unconditional) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.append((node.module, unconditional))
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Try | ast.If)
        for child in ast.iter_child_nodes(node):
            visit(child, unconditional and not inside)

    visit(tree, True)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CORE)))
def test_core_imports_torch_and_the_standard_library(path: Path) -> None:
    for module, unconditional in runtime_imports(ast.parse(path.read_text())):
        root = module.partition(".")[0]
        if root in OPTIONAL:
            assert not unconditional, f"{path.name} needs {module}"
        else:
            assert root in ALLOWED, f"{path.name} imports {module}"
        if root == "capo":
            assert module == "capo" or module.startswith("capo.core"), f"{path.name}: {module}"


def test_the_check_sees_what_it_should() -> None:
    source = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import jaxtyping
import numpy as np
def f():
    import triton
"""
    assert runtime_imports(ast.parse(source)) == [
        ("typing", True),
        ("numpy", True),
        ("triton", False),
    ]


def test_import_capo_loads_no_trainer() -> None:
    heavy = [
        "transformers",
        "trl",
        "datasets",
        "accelerate",
        "pandas",
        "altair",
        "pydantic",
        "typer",
        "rich",
        "jaxtyping",
        "beartype",
        "matplotlib",
        "verl",
    ]
    program = f"import sys, capo; print([m for m in {heavy!r} if m in sys.modules])"
    torch_only = f"import sys, torch; print([m for m in {heavy!r} if m in sys.modules])"
    ours, theirs = (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
        ).stdout.strip()
        for code in (program, torch_only)
    )
    assert ours == theirs, "import capo loads what import torch does not"


def test_public_names() -> None:
    for name in (
        "token_curvature",
        "TokenCurvature",
        "SGDStep",
        "AdamStep",
        "GivenStep",
        "LastLayerMoments",
        "select",
        "Selection",
        "Thresholds",
        "Reason",
        "InputError",
        "PAPER_THRESHOLDS",
    ):
        assert hasattr(capo, name), name
