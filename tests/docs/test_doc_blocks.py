"""Every code block of the documentation is executed, and the checks can fail."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from doc_blocks import LANGUAGES, PAGES, ROOT, check_command, commands, languages, parsed

from capo.core.errors import InputError

WITH_BLOCKS = [page for page in PAGES if languages(page.read_text())]


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    document = parsed(page)
    examples = list(document.examples())
    assert examples
    for example in examples:
        example.evaluate()


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_block_escapes(page: Path) -> None:
    assert set(languages(page.read_text())) <= LANGUAGES
    assert "skip:" not in page.read_text()


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("capo trian small-capo", "no `capo trian`"),
        ("capo --instal-completion", "--instal-completion"),
        ("capo train small-capo --ouput runs/x", "ouput"),
        ("capo train small-cap", "no preset"),
        ("capo train small-capo training.learning_rat=1", "learning_rat"),
        ("capo bench stepp", "no `capo bench stepp`"),
        ("capo bench step --setps 3", "setps"),
        ("capo eval embedded:sums --suite nope", "nope"),
        ("capo eval embedded:sums --problems 0", "problems"),
        ("make tset", "tset"),
        ("python examples/absent.py", "not there"),
        ("python -m capo.lab.tabular --outptu x", "outptu"),
        ("pip install 'capo-rl[nope]'", "nope"),
        ("frobnicate --all", "teach"),
    ],
)
def test_a_wrong_command_is_found(line: str, fault: str) -> None:
    (words,) = commands(line)
    with pytest.raises((AssertionError, InputError), match=re.escape(fault)):
        check_command(words)


def test_a_wrong_block_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    for block, error in (
        ("```python\nassert 1 == 2\n```", AssertionError),
        ("```sh\ncapo absent\n```", AssertionError),
        ("```toml\n[training]\nlearning_rat = 1.0\n```", InputError),
        ("<!-- invisible-code-block: python\nassert 1 == 2\n-->", AssertionError),
    ):
        page.write_text(f"# A page\n\n{block}\n")
        (example,) = parsed(page).examples()
        with pytest.raises(error):
            example.evaluate()
