"""The page: everything in one HTML file, or steps that are fetched from `capo inspect --serve`."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

import capo
from capo.core.errors import InputError
from capo.lab.inspect.encode import pack_step
from capo.lab.inspect.gather import REASONS, Gathered
from capo.lab.report.page import script_json
from capo.lab.rundir import write_text

LIMIT_MB = 10.0
FRAME = 400_000  # bytes left for the page itself


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        path: the HTML file.
        steps: recorded steps in it.
        recorded: recorded steps in all; more than ``steps`` where the limit left some out.
        size: of the file, bytes.
    """

    path: Path
    steps: int
    recorded: int
    size: int


def build_inspection(
    run: Path, output: Path, *, step: int | None = None, limit_mb: float = LIMIT_MB
) -> Written:
    """Write the token report of a run as one HTML file that needs no network.

    Args:
        run: its directory.
        output: the HTML file; its directory is made if need be.
        step: the recorded step to open at; by default the one with the largest policy shift of a token.
        limit_mb: size of the file at most, in 10⁶ bytes: where that is too little for all recorded steps,
            as many as fit, evenly spaced, with the first, the last and ``step``.

    Raises:
        InputError: no run, no recorded tokens, a step that was not recorded, or a limit too low for one.
    """
    output = Path(output)
    if output.is_dir():
        raise InputError("--output", f"{output} is a directory; give the HTML file to write.")
    gathered = Gathered(Path(run))
    if step is not None:
        gathered.check_step(step)
    packed = {
        n: base64.b64encode(pack_step(n, gathered.arrays(n))).decode() for n in gathered.files
    }
    kept = _that_fit({n: len(text) for n, text in packed.items()}, step, limit_mb)
    used = (
        np.unique(np.concatenate([arrays["token_ids"], arrays.get("prompt_ids", np.zeros(0))]))
        for arrays in map(gathered.arrays, kept)
    )
    html = render(gathered, {n: packed[n] for n in kept}, step, _words(gathered, used))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, html)
    return Written(output, len(kept), len(packed), output.stat().st_size)


def _words(gathered: Gathered, used: Iterable[Any]) -> dict[int, str]:
    ids = {int(token) for step in used for token in step}
    return {token: gathered.word(token) for token in sorted(ids)}


def _that_fit(sizes: dict[int, int], step: int | None, limit_mb: float) -> list[int]:
    """Steps whose encoded sizes stay within the limit: all, or evenly spaced ones."""
    room = limit_mb * 1e6 - FRAME
    steps = list(sizes)
    needed = {steps[0], steps[-1], *([step] if step is not None else [])}
    for count in range(len(steps), 0, -1):
        places = np.linspace(0, len(steps) - 1, count).round().astype(int)
        kept = sorted(needed | {steps[place] for place in places})
        if sum(sizes[one] for one in kept) <= room:
            return kept
    raise InputError(
        "--limit-mb",
        f"must be at least {(sum(sizes[n] for n in needed) + FRAME) / 1e6:.1f} for this run, got "
        f"{limit_mb:g}; or use --serve, which needs no file.",
    )


def render(
    gathered: Gathered,
    packed: dict[int, str] | None,
    step: int | None,
    words: dict[int, str],
) -> str:
    """The page's HTML.

    Args:
        gathered: the run.
        packed: the steps in it, base64; None for a page that fetches them.
        step: to open at.
        words: text of the token ids.
    """
    offenders, ranges = gathered.survey()
    run, worst = gathered.run, offenders.table("context")
    shown = list(gathered.files) if packed is None else list(packed)
    if step is None:
        step = next((int(row["step"]) for row in worst if row["step"] in shown), shown[0])
    payload = {
        "run": run.name,
        "steps": shown,
        "recorded": len(gathered.files),
        "packed": packed,
        "open": step,
        "words": words,
        "reasons": REASONS,
        "ranges": ranges,
        "curves": gathered.curves(),
        "offenders": {"token": offenders.table("token"), "context": worst},
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("capo.lab.inspect"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("inspect.html.j2").render(
        run=run,
        version=capo.__version__,
        steps=len(shown),
        recorded=len(gathered.files),
        payload=script_json(payload),
        base=Markup((files("capo.lab.report") / "templates" / "report.css").read_text("utf-8")),
        style=Markup(_resource("inspect.css")),
        script=Markup(_resource("inspect.js")),
    )


def _resource(name: str) -> str:
    return (files("capo.lab.inspect") / "templates" / name).read_text(encoding="utf-8")
