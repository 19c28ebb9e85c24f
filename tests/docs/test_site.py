"""The site is built, without a warning; its reference is whole; a browser opens every page."""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from doc_blocks import ROOT

import capo
import capo.integrations.trl
import capo.tasks
from browser_kit import WAIT, chromium
from needed import CI

if not CI and not all(map(find_spec, ("mkdocs", "material", "mkdocstrings", "latex2mathml"))):
    pytest.skip("the extra `docs` is not installed", allow_module_level=True)

pytestmark = pytest.mark.slow
SOURCES = ("docs", "results", "src", "examples", "mkdocs.yml", "README.md", "CHANGELOG.md")


def build(root: Path, target: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)]
    environment = os.environ | {
        "NO_MKDOCS_2_WARNING": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("docs") / "site"
    built = build(ROOT, target)
    assert built.returncode == 0, built.stderr
    return target


def pages(site: Path) -> list[str]:
    return sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))


def test_every_public_name_has_an_entry(site: Path) -> None:
    reference = "".join(path.read_text() for path in (site / "reference").glob("*.html"))
    for module in (capo, capo.integrations.trl, capo.tasks):
        for name in module.__all__:
            entry = re.search(rf'id="capo\.(?:[\w.]*\.)?{name}"', reference)
            assert entry or name == "__version__", f"{module.__name__}.{name}"
    commands = (site / "reference" / "cli.html").read_text()
    for command in ("train", "compare", "report", "eval", "demo", "pretrain", "bench", "presets"):
        assert f"capo {command}" in commands
    assert "--learning-rates" in commands  # of `capo bench fidelity`, which parses by itself


def test_formulas_and_names_are_rendered(site: Path) -> None:
    method = (site / "method.html").read_text()
    assert method.count("<math") > 30
    for page in pages(site):
        text = (site / page).read_text()
        assert "<merror" not in text
        assert 'class="arithmatex"' not in text
        assert ":class:<" not in text
    assert '<a class="autorefs' in method  # names lead to the reference


def test_tables_of_results_come_from_the_files(site: Path) -> None:
    text = (site / "results" / "theorem_5_1" / "index.html").read_text()
    assert "Violations exact" in text
    for directory in (ROOT / "results").iterdir():
        if directory.is_dir():
            assert f"results/{directory.name}/index.html" in (site / "results.html").read_text()


def test_faults_fail_the_build(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    for page, text in (
        ("start.md", "[x](absent.md)"),
        ("start.md", "[x](method.md#nowhere)"),
        ("orphan.md", "# Orphan"),
    ):
        with (copy / "docs" / page).open("a") as handle:
            handle.write(f"\n{text}\n")
    built = build(copy, tmp_path / "site")
    assert built.returncode != 0
    said = built.stderr + built.stdout
    assert said.count("WARNING") == 3, said
    for fault in ("absent.md", "nowhere", "orphan.md"):
        assert fault in said


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as chrome:
        yield chrome


def emulate(driver: Any, width: int, scheme: str) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_pages_open(driver: Any, address: str, site: Path, width: int, scheme: str) -> None:
    driver.get_log("browser")
    emulate(driver, width, scheme)
    for page in pages(site):
        driver.get(f"{address}/{page}")
        assert driver.get_log("browser") == [], page
        loads = driver.execute_script(
            "return performance.getEntriesByType('resource').map(e => e.name)"
        )
        assert [one for one in loads if not one.startswith((address, "data:"))] == [], page
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width, page
        broken = "return [...document.images].filter(i => i.complete && !i.naturalWidth).length"
        assert driver.execute_script(broken) == 0, page


@pytest.mark.browser
@pytest.mark.parametrize("origin", ["server", "disk"])
def test_theme_and_search(driver: Any, address: str, site: Path, origin: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    start = address if origin == "server" else site.as_uri()
    emulate(driver, 1280, "light")
    driver.get(f"{start}/method.html")
    background = "return getComputedStyle(document.body).backgroundColor"
    light = driver.execute_script(background)
    driver.execute_script("document.querySelector('label[for=__palette_1]').click()")
    WebDriverWait(driver, WAIT).until(lambda d: d.execute_script(background) != light)
    box = driver.find_element("css selector", "input.md-search__input")
    driver.execute_script("arguments[0].focus()", box)
    box.send_keys("rejection_rate")
    found = "return document.querySelectorAll('.md-search-result__item').length"
    WebDriverWait(driver, WAIT).until(lambda d: d.execute_script(found) > 0)
    link = driver.find_element("css selector", ".md-search-result__link").get_attribute("href")
    assert link.startswith(start)
    assert driver.get_log("browser") == []
