"""The token report in a real browser: drawn, filtered, walked through by keyboard, console silent."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import config, write_run
from test_report_browser import WAIT, count, driver, pytestmark, style

from capo.lab.inspect import build_inspection
from capo.lab.inspect.server import make_server

__all__ = ["driver", "pytestmark"]  # a fixture and a mark, used by name


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "watched"
    return write_run(path, config("watched", capo__selection="capo"), tokens=6)


@pytest.fixture(scope="module")
def page(run: Path) -> Path:
    return build_inspection(run, run.parent / "page.html").path


def at_step(driver: Any) -> int:
    from selenium.webdriver.support.ui import WebDriverWait

    found = "return document.documentElement.dataset.step"
    WebDriverWait(driver, WAIT).until(lambda d: d.execute_script(found))
    return int(driver.execute_script(found))


def until_step(driver: Any, wanted: int) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, WAIT).until(lambda d: at_step(d) == wanted)


@pytest.fixture
def opened(driver: Any, page: Path) -> Iterator[Any]:
    driver.get("about:blank")
    driver.get_log("browser")
    driver.get(f"{page.as_uri()}")
    at_step(driver)
    yield driver
    assert driver.get_log("browser") == []
    loads = "return performance.getEntriesByType('resource').map(e => e.name)"
    fetched = [one for one in driver.execute_script(loads) if not one.startswith("data:")]
    assert fetched == []


def steps(driver: Any) -> list[int]:
    read = "return JSON.parse(document.getElementById('payload').textContent).steps"
    found: list[int] = driver.execute_script(read)
    return found


def set_value(driver: Any, name: str, value: str) -> None:
    driver.execute_script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
        "e.dispatchEvent(new Event(e.tagName === 'SELECT' ? 'change' : 'input'))",
        name,
        value,
    )


def press(driver: Any, key: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(driver).send_keys(key).perform()


def test_tokens_are_coloured_legibly(opened: Any) -> None:
    assert count(opened, ".completion") > 0
    assert count(opened, "#plot svg path.line") == 1
    contrast = """
      const l = (c) => { const v = c.match(/[0-9.]+/g).slice(0, 3).map((x) => { x /= 255;
        return x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4; });
        return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
      return Math.min(...[...document.querySelectorAll('.t')].map((t) => { const s = getComputedStyle(t);
        const [a, b] = [l(s.color), l(s.backgroundColor)].sort((x, y) => y - x);
        return (a + 0.05) / (b + 0.05); }))"""
    for _theme in range(2):
        for name in ("policy_shift", "objective_shift", "surprise", "entropy", "advantage"):
            before = style(opened, ".t", "backgroundColor")
            set_value(opened, "colour", name)
            assert opened.execute_script(contrast) >= 4.5, name
        assert style(opened, ".t", "backgroundColor") != before
        press(opened, "t")


def test_colours_keep_their_order_without_hue(opened: Any) -> None:
    """The legend's ramp in grey: monotone for sizes, either way from the middle for signs."""
    read = """
      const ramp = getComputedStyle(document.querySelector('#legend i')).backgroundImage;
      return [...ramp.matchAll(/rgb\\(([^)]*)\\)/g)]
        .map((m) => { const v = m[1].split(',').map((x) => { x = +x / 255;
          return x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4; });
          return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; })"""
    for _theme in range(2):
        dark = opened.execute_script("return document.documentElement.dataset.theme") == "dark"
        set_value(opened, "colour", "policy_shift")
        sizes = opened.execute_script(read)
        assert len(sizes) == 10
        assert sizes == sorted(sizes, reverse=not dark)  # large: dark on white, bright on black
        set_value(opened, "colour", "objective_shift")
        signs = opened.execute_script(read)
        assert len(signs) == 9
        assert signs[:5] == sorted(signs[:5], reverse=dark)
        assert signs[4:] == sorted(signs[4:], reverse=not dark)
        press(opened, "t")


def test_filters(opened: Any) -> None:
    read = "return [...document.querySelectorAll('.completion')].map((c) => c.textContent)"
    everything = opened.execute_script(read)
    set_value(opened, "verdict", "rejected")
    some = count(opened, ".completion")
    assert some == count(opened, ".completion:has(.t.out)")
    set_value(opened, "verdict", "kept")
    assert count(opened, ".t.out") == 0
    assert some + count(opened, ".completion") == len(everything)
    set_value(opened, "verdict", "all")
    set_value(opened, "search", "no completion says this")
    assert count(opened, ".completion") == 0
    set_value(opened, "search", "")
    set_value(opened, "reward-low", "1000")
    assert count(opened, ".completion") == 0
    set_value(opened, "reward-low", "")
    assert opened.execute_script(read) == everything


def test_keys_walk_through_steps_and_tokens(opened: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    known = steps(opened)
    set_value(opened, "step", "0")
    until_step(opened, known[0])
    press(opened, Keys.ARROW_RIGHT)
    until_step(opened, known[1])
    press(opened, Keys.ARROW_LEFT)
    until_step(opened, known[0])
    press(opened, "n")
    tip = opened.find_element("id", "tip")
    assert tip.is_displayed()
    for label in ("probability", "entropy", "advantage", "m_F", "m_H", "verdict"):
        assert label in tip.text
    first = opened.execute_script("return document.activeElement.dataset.i")
    press(opened, Keys.ARROW_RIGHT)  # within a completion: the next token
    assert opened.execute_script("return document.activeElement.dataset.i") == str(int(first) + 1)
    press(opened, Keys.ESCAPE)
    assert not tip.is_displayed()
    press(opened, "?")
    assert opened.execute_script("return document.getElementById('help').open")
    press(opened, Keys.ESCAPE)


def test_curve_and_offenders_lead_to_their_step(opened: Any) -> None:
    known = steps(opened)
    set_value(opened, "step", "0")
    until_step(opened, known[0])
    opened.execute_script(
        "const s = document.querySelector('#plot svg'), b = s.getBoundingClientRect();"
        "s.dispatchEvent(new MouseEvent('click', {clientX: b.right - 12, clientY: b.top + 40}))"
    )
    until_step(opened, known[-1])
    row = opened.find_element("css selector", "#offenders tr")
    step = int(row.find_elements("tag name", "td")[-1].text)
    row.find_element("tag name", "button").click()
    until_step(opened, step)
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(opened, WAIT).until(lambda d: count(d, ".t.found") > 0)
    assert opened.execute_script("return document.activeElement.classList.contains('found')")
    set_value(opened, "scope", "step")
    set_value(opened, "by", "token")
    assert count(opened, "#offenders tr") > 0


def test_theme(opened: Any) -> None:
    before = style(opened, "body", "backgroundColor")
    press(opened, "t")
    assert style(opened, "body", "backgroundColor") != before
    press(opened, "t")
    assert style(opened, "body", "backgroundColor") == before


def test_served_page_fetches_its_steps(driver: Any, run: Path) -> None:
    server = make_server(run, step=None)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        driver.get_log("browser")
        driver.get(f"http://127.0.0.1:{server.server_address[1]}/")
        at_step(driver)
        assert count(driver, ".completion") > 0
        assert driver.get_log("browser") == []
    finally:
        server.shutdown()
        server.server_close()
