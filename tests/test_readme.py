"""The README's code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_own_loop() -> None:
    (block,) = [b for b in python_blocks((ROOT / "README.md").read_text()) if "import torch" in b]
    names: dict[str, Any] = {}
    exec(block, names)  # the project's own README
    assert names["selection"].weights.shape == (6,)
    assert torch.isfinite(names["curvature"].objective_shift).all()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # TRL's own default
def test_trl_lines_compile_and_name_real_things() -> None:
    (block,) = [b for b in python_blocks((ROOT / "README.md").read_text()) if "CAPOTrainer" in b]
    compile(block, "README.md", "exec")
    from capo.integrations.trl import CAPOConfig, CAPOTrainer

    assert CAPOTrainer.__name__ in block
    assert CAPOConfig(selection="capo", bf16=False, report_to="none").rule() is not None


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"
