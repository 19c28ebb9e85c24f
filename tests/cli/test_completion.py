"""Tab: a real bash is offered presets, keys, figures, suites, and what it offers is what there is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from capo.cli import completing
from capo.cli.make import BENCHES
from capo.lab.config import Config
from capo.lab.figures import all_figures
from capo.lab.sources import preset_names
from capo.lab.suites import suite_names
from capo.planning.job import Job
from capo.policies.loading import EMBEDDED
from capo.policies.recipes import recipe_names
from capo.tasks import TASKS

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def words(offers: list[tuple[str, str]]) -> list[str]:
    return [word for word, _ in offers]


def test_what_is_offered_is_what_there_is(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert words(completing.presets("")) == preset_names()
    assert words(completing.figures("")) == [*sorted(f.name for f in all_figures()), "all"]
    assert words(completing.suites("")) == suite_names()
    assert words(completing.recipes("")) == recipe_names()
    assert words(completing.benches("")) == list(BENCHES)
    assert words(completing.policies("")) == list(EMBEDDED)
    assert words(completing.tasks("")) == list(TASKS)
    for name, of in (("sharding", completing.shardings), ("precision", completing.precisions)):
        for word in words(of("")):
            Job(gpus=2, **{name: word})
    assert all(help for _, help in completing.presets("small"))


def test_keys_and_their_words():
    keys = words(completing.overrides(""))
    assert {key.split(".")[0] for key in keys} == set(Config.model_fields)
    assert words(completing.overrides("training.learning_r")) == ["training.learning_rate="]
    assert "algorithm.name=reinforce" in words(completing.overrides("algorithm.name="))
    assert words(completing.overrides("capo.watch=t")) == ["capo.watch=true"]
    assert "capo.selection=dr_capo" in words(completing.overrides("capo.selection="))
    assert words(completing.overrides("training.learning_rate=")) == []


def test_files_are_offered_beside_presets(monkeypatch, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "mine.toml").touch()
    (tmp_path / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    assert words(completing.configs("m")) == ["mine.toml"]
    assert words(completing.configs("r")) == ["runs/"]
    assert words(completing.configs("absent/x")) == []


def bash(script: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HOME": str(home),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
    }
    return subprocess.run(
        ["bash", "--norc", "-c", script],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("capo train small-a", ["small-aggressive", "small-aggressive-capo"]),
        ("capo train small-capo training.st", ["training.steps="]),
        ("capo lab reproduce ta", ["table1", "table5", "tasks"]),
        ("capo doc", ["doctor"]),
    ],
)
def test_bash_completes(tmp_path, line, offered):
    *_, last = line.split()
    script = (
        'eval "$(_CAPO_COMPLETE=source_bash capo)"\n'
        f"COMP_WORDS=({line}); COMP_CWORD={len(line.split()) - 1}\n"
        f"_capo_completion capo {last}\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    assert sorted(bash(script, tmp_path).stdout.split()) == offered


def test_completion_is_installed_and_shown(tmp_path):
    # `true` after it keeps bash from replacing itself by capo, which asks for its parent's name.
    shown = bash("capo --show-completion; true", tmp_path)
    assert "_CAPO_COMPLETE=complete_bash" in shown.stdout
    bash("capo --install-completion; true", tmp_path)
    assert "_capo_completion" in (tmp_path / ".bash_completions" / "capo.sh").read_text()
    assert "capo.sh" in (tmp_path / ".bashrc").read_text()


def test_completing_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from capo.cli import completing as c\n"
        "for of in (c.configs, c.overrides, c.figures, c.suites, c.recipes, c.policies): of('')\n"
        "assert not {'torch', 'transformers', 'pandas'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
