"""The glossary lists what runs log; the paper's index and the reference name what exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
from doc_blocks import ROOT
from pydantic import BaseModel

import capo
from capo.core.selection import Reason
from capo.lab.config import Config
from capo.lab.run import train
from capo.lab.rundir import RunDirectory
from capo.lab.sources import load_config, preset_names
from run_kit import tiny

GLOSSARY = (ROOT / "docs" / "metrics.md").read_text()
PAPER = (ROOT / "docs" / "paper.md").read_text()
RUNS = {
    "masks": ("capo.selection=capo", "capo.trust_region=auto", "algorithm.num_iterations=2"),
    "quadratic": (
        "capo.trust_region.step_length=quadratic",
        "algorithm.beta=0.01",
        "rival.rule=skip_on_spike",
    ),
    "watched": ("capo.watch=true", "rival.rule=kl_adaptive"),
}


def listed(text: str) -> set[str]:
    """The keys of a page's tables."""
    return set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_glossary_lists_what_a_run_logs(name: str, tmp_path: Path) -> None:
    run = RunDirectory(train(tiny(*RUNS[name]), tmp_path / name))
    logs = ("metrics.jsonl", "evals.jsonl", "ledger.jsonl", "alarms.jsonl")
    logged = {key for log in logs for row in run.rows(log) for key in row}
    assert any(key.startswith("capo/trust/") for key in logged)
    assert logged <= listed(GLOSSARY), f"docs/metrics.md lacks {logged - listed(GLOSSARY)}"


def test_glossary_lists_what_the_source_names() -> None:
    keys = {
        key
        for path in (ROOT / "src").rglob("*.py")
        for key in re.findall(r"\"((?:capo|rival)/[a-z_0-9/]+[a-z_0-9])\"", path.read_text())
    }
    assert len(keys) > 10
    # A rule's reasons make keys of their own; a budget cannot be configured, so a run has none.
    reasons = {f"capo/rejection_rate/{r.label}" for r in Reason if r > 0} - {
        "capo/rejection_rate/budget"
    }
    prefixes = {"capo/trust"}  # completed where they are used
    assert keys | reasons <= listed(GLOSSARY) | prefixes


def test_glossary_invents_nothing() -> None:
    source = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    for key in listed(GLOSSARY):
        if key.startswith(("capo/", "rival/")):
            last = key.rpartition("/")[2]
            assert last in source or last in {r.label for r in Reason}, key


def find(name: str) -> Any:
    """The object, module or configuration key of a dotted name.

    Raises:
        LookupError: there is none.
    """
    parts = name.split(".")
    if len(parts) == 2 and parts[0] in Config.model_fields:
        section = Config.model_fields[parts[0]].annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            if parts[1] in section.model_fields:
                return section.model_fields[parts[1]]
            if parts[0] != "capo":
                raise LookupError(name)
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            if not hasattr(found, part):
                raise LookupError(name)
            found = getattr(found, part)
        return found
    raise LookupError(name)


def unknown(text: str) -> list[str]:
    """What a page's tables name in backticks and the repository does not have."""
    wrong = []
    for row in re.findall(r"^\| (?!in the paper|---).*$", text, re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", row):
            if re.fullmatch(r"[a-z_]+(\.\w+)+", name) and not name.endswith(
                (".md", ".py", ".toml", ".sh", ".json")
            ):
                try:
                    find(name)
                except LookupError:
                    wrong.append(name)
            elif "/" in name and "." in name:
                wrong += [] if (ROOT / name).exists() else [name]
            elif name.startswith(("paper-", "small-")):
                wrong += [] if name in preset_names() else [name]
    return wrong


def test_the_papers_index_names_what_exists() -> None:
    assert unknown(PAPER) == []
    assert len(re.findall(r"^\| ", PAPER, re.MULTILINE)) > 40


def test_a_wrong_name_is_found() -> None:
    names = ("capo.tokn_curvature", "src/capo/core/absent.py", "training.lerning_rate", "paper-x")
    for name in names:
        assert unknown(f"| something | `{name}` |") == [name]


def test_the_papers_thresholds_and_presets_agree() -> None:
    for base, name in (("capo", "paper-aggressive"),):
        assert load_config(name).capo.selection == base
        assert base in capo.PAPER_THRESHOLDS


def test_the_monitor_is_on_in_at_most_five_added_lines() -> None:
    """The page's script, which `test_doc_blocks` runs, is plain TRL without the lines marked as added."""
    page = (ROOT / "docs" / "monitor.md").read_text()
    (script,) = re.findall(r"```python\n(from trl import GRPOConfig.*?)```", page, re.DOTALL)
    added = [line for line in script.splitlines() if line.endswith("# added")]
    assert 1 <= len(added) <= 5
    rest = [line for line in script.splitlines() if line not in added]
    assert not any("capo" in line or "monitor" in line for line in rest)
    compile("\n".join(rest), "plain", "exec")
