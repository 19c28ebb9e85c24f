"""The report in a real browser: figures drawn, theme switched, console silent."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import config, write_run

from browser_kit import WAIT, chromium
from capo.lab.report import build_report

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as chrome:
        yield chrome


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    fast = {"training__learning_rate": 2.5e-4, "capo__selection": "capo"}
    runs = [
        write_run(root / "slow", config("slow"), shifts=False),
        write_run(root / "fast", config("fast", **fast), shape="collapses", tokens=2),
    ]
    return build_report(runs, root / "report.html")


@pytest.fixture
def opened(driver: Any, report: Path) -> Any:
    driver.get_log("browser")  # what an earlier test left
    driver.get(report.as_uri())
    drawn(driver)
    return driver


def drawn(driver: Any) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    script = "return document.documentElement.dataset.charts === 'ready'"
    WebDriverWait(driver, WAIT).until(lambda d: d.execute_script(script))


def count(driver: Any, selector: str) -> int:
    found: int = driver.execute_script(
        "return document.querySelectorAll(arguments[0]).length", selector
    )
    return found


def style(driver: Any, selector: str, name: str) -> str:
    found: str = driver.execute_script(
        "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]",
        selector,
        name,
    )
    return found


def test_figures_are_drawn_and_the_console_is_silent(opened: Any) -> None:
    charts = count(opened, ".chart")
    assert charts >= 9
    assert count(opened, ".chart svg") == charts
    assert count(opened, ".chart.failed") == 0
    # The lines of both runs, and nothing fetched.
    assert count(opened, "#fig-accuracy .mark-line path") == 2
    loads = "return performance.getEntriesByType('resource').map(e => e.name)"
    assert [one for one in opened.execute_script(loads) if not one.startswith("data:")] == []
    assert opened.get_log("browser") == []


def test_theme_toggle(opened: Any) -> None:
    def look() -> tuple[str, str, str]:
        label = "#fig-accuracy .role-axis-label text"
        line = "#fig-accuracy .mark-line path"
        background = style(opened, "body", "backgroundColor")
        return background, *(
            opened.execute_script(
                "return document.querySelector(arguments[0]).getAttribute(arguments[1])", *which
            )
            for which in ((label, "fill"), (line, "stroke"))
        )

    before = look()
    opened.find_element("id", "theme").click()
    drawn(opened)
    after = look()
    assert all(one != other for one, other in zip(before, after, strict=True))
    opened.refresh()
    drawn(opened)
    assert look() == after  # remembered
    opened.find_element("id", "theme").click()
    drawn(opened)
    assert look() == before
    assert opened.get_log("browser") == []


def test_series_are_switched_off_and_on(opened: Any) -> None:
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    chip = opened.find_element("css selector", ".chip[data-series='fast']")
    for pressed, lines in (("false", 1), ("true", 2)):
        chip.send_keys(Keys.ENTER)  # by keyboard
        assert chip.get_attribute("aria-pressed") == pressed
        WebDriverWait(opened, WAIT).until(
            lambda d, n=lines: count(d, "#fig-accuracy .mark-line path") == n
        )
    assert opened.get_log("browser") == []


@pytest.mark.parametrize("width", [1280, 390])
def test_page_fits_its_window(opened: Any, width: int) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    opened.refresh()
    drawn(opened)
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    svg = "return document.querySelector('#fig-accuracy svg').getBoundingClientRect().right"
    assert opened.execute_script(svg) <= width
    opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_every_figure_is_saved_in_each_form(opened: Any, tmp_path: Path) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    where = {"behavior": "allow", "downloadPath": str(tmp_path)}
    opened.execute_cdp_cmd("Browser.setDownloadBehavior", where)
    figures = count(opened, ".chart")
    assert count(opened, ".save") == 3 * figures
    slug = opened.execute_script("return document.querySelector('.chart').dataset.figure")
    begins = {"svg": b"<svg", "png": b"\x89PNG", "csv": b""}
    for kind, begin in begins.items():
        click = f"document.querySelector('.save[data-figure=\"{slug}\"][data-kind={kind}]').click()"
        opened.execute_script(click)
        saved = tmp_path / f"{slug}.{kind}"
        WebDriverWait(opened, WAIT).until(lambda _, saved=saved: saved.is_file())
        assert saved.read_bytes().startswith(begin)
    beside = Path(opened.current_url.removeprefix("file://"))
    table = (beside.parent / f"{beside.stem}_figures" / f"{slug}.csv").read_text().splitlines()
    assert len((tmp_path / f"{slug}.csv").read_text().splitlines()) == len(table)


def test_screenshot_is_not_blank(opened: Any) -> None:
    shot = opened.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"]
    assert base64.b64decode(shot).startswith(b"\x89PNG\r\n")
    # Count the colours where they can be counted without an image library: in the browser.
    colours = opened.execute_async_script(
        """
        const done = arguments[1], image = new Image();
        image.onload = () => {
          const canvas = document.createElement("canvas");
          canvas.width = image.width; canvas.height = image.height;
          const context = canvas.getContext("2d");
          context.drawImage(image, 0, 0);
          const data = context.getImageData(0, 0, image.width, image.height).data;
          const seen = new Set();
          for (let i = 0; i < data.length; i += 4) {
            seen.add((data[i] << 16) | (data[i + 1] << 8) | data[i + 2]);
          }
          done(seen.size);
        };
        image.src = "data:image/png;base64," + arguments[0];
        """,
        shot,
    )
    assert colours > 30
