"""The report itself: one HTML file that needs no network, and its figures beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import vl_convert
from altair import SCHEMA_VERSION
from markupsafe import Markup

import capo
from capo.core.errors import InputError
from capo.lab.report import figures, rows
from capo.lab.report.alarms import read_alarms
from capo.lab.report.charts import Figure
from capo.lab.report.reading import Run, read_runs
from capo.lab.report.style import DARK_SERIES, LIGHT_SERIES, swatches, vega_config
from capo.lab.report.summary import Series, group_series, headline, summarise
from capo.lab.report.tokens import worst_offenders

VEGA_LITE = ".".join(SCHEMA_VERSION.removeprefix("v").split(".")[:2])
EXPORT_SCALE = 2.0  # PNG pixels a CSS pixel
TITLE = "Training report"


def build_report(
    runs: Sequence[Path],
    output: Path,
    title: str = TITLE,
    *,
    target_accuracy: float = 0.75,
) -> Path:
    """Write a report on training runs: one self-contained HTML file, readable offline.

    Next to it, in ``<output without suffix>_figures/``, every figure as PNG and SVG and its data
    as CSV. Existing files of those names are replaced.

    Args:
        runs: run directories; those that differ only in ``run.seed`` are drawn as one series.
        output: the HTML file to write; its directory is made if need be.
        title: heading of the page.
        target_accuracy: in (0, 1]; completions needed to reach it are reported.

    Returns:
        ``output``.

    Raises:
        InputError: no run, a directory that is no run directory, or a bad ``target_accuracy``.
    """
    if not 0 < target_accuracy <= 1:
        raise InputError("target_accuracy", f"must be in (0, 1], got {target_accuracy}.")
    output = Path(output)
    if output.is_dir():
        raise InputError("output", f"{output} is a directory; give the HTML file to write.")
    found = read_runs(runs)
    series = group_series([summarise(run, target_accuracy) for run in found])
    sections = figures.sections(series, target_accuracy)
    drawn = [figure for _, _, members in sections for figure in members]
    html = _render(found, series, sections, title, target_accuracy)
    output.parent.mkdir(parents=True, exist_ok=True)
    _export(drawn, output.with_suffix("").with_name(f"{output.stem}_figures"))
    output.write_text(html, encoding="utf-8")
    return output


def _render(
    found: list[Run],
    series: list[Series],
    sections: list[tuple[str, str, list[Figure]]],
    title: str,
    target_accuracy: float,
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("capo.lab.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawn = [figure for _, _, members in sections for figure in members]
    payload = {
        "figures": {figure.slug: figure.spec(page=True) for figure in drawn},
        "themes": {"light": vega_config(dark=False), "dark": vega_config(dark=True)},
        "vegaLite": VEGA_LITE,
    }
    return environment.get_template("report.html.j2").render(
        title=title,
        headline=headline(series, target_accuracy),
        target=f"{target_accuracy:g}",
        version=capo.__version__,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        series=series,
        swatches=swatches([one.name for one in series]),
        light=LIGHT_SERIES,
        dark=DARK_SERIES,
        rows=rows.summary_rows(series),
        budgets=any(summary.within for one in series for summary in one.summaries),
        sections=sections,
        runs=found,
        notes=[(run.name, note) for run in found for note in run.notes],
        alarms=[(run.name, alarm) for run in found for alarm in read_alarms(run)],
        offenders=[(run, tokens) for run in found if (tokens := worst_offenders(run)).offenders],
        unrecorded=[run.name for run in found if not (run.path / "tokens").is_dir()],
        difference=rows.config_difference(found),
        provenance=[rows.provenance_row(run) for run in found],
        pretty=rows.pretty,
        payload=script_json(payload),
        bundle=_bundle(),
        style=Markup(_resource("report.css")),
        script=Markup(_resource("report.js")),
    )


def _resource(name: str) -> str:
    return (files("capo.lab.report") / "templates" / name).read_text(encoding="utf-8")


def script_json(value: Any) -> Markup:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


def _bundle() -> Markup:
    """Vega, Vega-Lite and vega-embed, once for the whole page."""
    code: str = vl_convert.javascript_bundle(vl_version=VEGA_LITE)  # type: ignore[call-arg]  # its stub forgets the default
    return Markup(re.sub(r"</(?=script)", r"<\\/", code, flags=re.IGNORECASE))


def _export(drawn: list[Figure], folder: Path) -> None:
    """PNG, SVG and CSV of every figure, light theme on white."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**vega_config(dark=False), "background": "white"}
    for figure in drawn:
        spec = figure.spec(page=False)
        figure.data.to_csv(folder / f"{figure.slug}.csv", index=False)
        svg = vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE, config=config)
        (folder / f"{figure.slug}.svg").write_text(svg, encoding="utf-8")
        png = vl_convert.svg_to_png(svg, scale=EXPORT_SCALE)
        (folder / f"{figure.slug}.png").write_bytes(png)
