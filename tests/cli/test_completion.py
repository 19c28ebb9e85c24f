"""Tab: real shells are offered presets, keys, figures, suites, and what they offer is what there is."""

from __future__ import annotations

import os
import re
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
from needed import needed
from terminal_kit import converse

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


def environment(home: Path) -> dict[str, str]:
    return os.environ | {
        "HOME": str(home),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
        "TERM": "dumb",
        "PS1": "$ ",
    }


def script(shell: str, code: str, home: Path) -> str:
    return subprocess.run(
        [needed(shell), *(["--norc"] if shell == "bash" else []), "-c", code],
        env=environment(home),
        cwd=home,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


INTERACTIVE = {
    "bash": ["bash", "--norc", "-i"],
    "zsh": ["zsh", "-f", "-i"],
}
SET_UP = {"bash": "true", "zsh": "autoload -Uz compinit; compinit -u -D; setopt no_list_beep"}


def typed(shell: str, keys: str, home: Path) -> tuple[list[str], str]:
    """The words that a line of keys comes to on a real terminal, and all that was shown."""
    needed(shell)
    lines = (
        SET_UP[shell],
        f'eval "$(_CAPO_COMPLETE=source_{shell} capo)"',
        "capo() { printf '(%s)' \"$@\"; echo ' so far'; }",  # what is completed is run by its name
        keys,
        "exit",
    )
    shown: list[bytes] = []
    keys = "".join(f"{line}\n" for line in lines)
    command, settings = INTERACTIVE[shell], environment(home)
    converse(
        command, shown.append, cwd=home, environment=settings, columns=80, limit=120, keys=keys
    )
    text = b"".join(shown).decode()
    words = re.findall(r"^((?:\([^)\n]*\))+) so far", text, re.M)
    assert len(words) == 1, text
    return words[0][1:-1].split(")("), text


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["bash", "zsh"])
@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("capo train small-aggressive-c\t", "train small-aggressive-capo"),
        ("capo train small-capo training.st\t5", "train small-capo training.steps=5"),
        ("capo train small-capo training.optimizer=s\t", "train small-capo training.optimizer=sgd"),
        ("capo train small-capo capo.selection=dr\tx", "train small-capo capo.selection=dr_capo x"),
        ("capo compare ru\tx", "compare runs/x"),
        ("capo doc\t", "doctor"),
    ],
)
def test_on_a_terminal_tab_completes(shell, keys, words, tmp_path):
    (tmp_path / "runs").mkdir()
    assert typed(shell, keys, tmp_path)[0] == words.split()


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_on_a_terminal_tab_shows_what_there_is(shell, tmp_path):
    _, shown = typed(shell, "capo train small-a\t\t\t", tmp_path)
    assert "small-aggressive-capo" in shown
    assert "collapses. " not in shown  # a help's second line is not offered
    _, shown = typed(shell, "capo train small-capo capo.selection=\t\t", tmp_path)
    assert "reincapo" in shown
    assert "algorithm.name=" not in shown


OFFERED = [
    ("capo train small-a", ["small-aggressive", "small-aggressive-capo"]),
    ("capo train small-capo training.st", ["training.steps="]),
    ("capo lab reproduce ta", ["table1", "table5", "tasks"]),
    ("capo doc", ["doctor"]),
]


@pytest.mark.parametrize(("line", "offered"), OFFERED)
def test_bash_is_offered(tmp_path, line, offered):
    code = (
        'eval "$(_CAPO_COMPLETE=source_bash capo)"\n'
        "compopt() { true; }\n"
        f'COMP_LINE="{line}"; COMP_POINT={len(line)}\n'
        "_capo_completion capo\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    assert sorted(script("bash", code, tmp_path).split()) == offered


@pytest.mark.parametrize(("line", "offered"), OFFERED)
def test_fish_is_offered(tmp_path, line, offered):
    code = f'_CAPO_COMPLETE=source_fish capo | source; complete -C "{line}"'
    rows = script("fish", code, tmp_path).splitlines()
    assert sorted(row.split("\t")[0] for row in rows if row) == offered


def test_completion_is_installed_and_shown(tmp_path):
    # `true` after it keeps bash from replacing itself by capo, which asks for its parent's name.
    shown = script("bash", "capo --show-completion; true", tmp_path)
    assert "compopt -o nospace" in shown
    script("bash", "capo --install-completion; true", tmp_path)
    assert (tmp_path / ".bash_completions" / "capo.sh").read_text().strip() == shown.strip()
    assert "capo.sh" in (tmp_path / ".bashrc").read_text()


def test_completing_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from capo.cli import completing as c\n"
        "for of in (c.configs, c.overrides, c.figures, c.suites, c.recipes, c.policies): of('')\n"
        "assert not {'torch', 'transformers', 'pandas'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
