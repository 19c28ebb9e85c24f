"""The records as one table, and as ``README.md``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from capo.lab.gpu.sizes import sizes_of

DRY = "DRY RUN at tiny sizes without a GPU: every part works, no time means anything."
PLAIN = "GRPO"
ASKED = {"naive_faster": 5.0, "naive_memory": 50.0, "overhead": 0.01}


def load(output: Path) -> dict[str, dict[str, Any]]:
    """The stages' records, by name."""
    return {p.stem: json.loads(p.read_text()) for p in sorted(output.glob("*.json"))}


def table(output: Path) -> str:
    """Everything in one table of text."""
    records = load(output)
    rows = [("", "time ms", "extra MB", "beside")]
    if "core" in records:
        rows += _core_rows(records["core"])
    for name in sorted(name for name in records if name.startswith("step")):
        rows += _step_rows(records[name])
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows
    ]
    if any(r.get("scale") == "tiny" for r in records.values()):
        lines.insert(0, DRY)
    return "\n".join(lines)


def _core_rows(core: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    rows = []
    size, limits = core.get("sizes", {}), core.get("ceilings", {})
    if limits:
        rows.append(
            (
                "ceilings",
                "",
                "",
                f"copy {limits['copy_tbps']:.2f} TB/s, "
                f"16-bit product {limits['matmul_tflops']:.0f} TFLOP/s",
            )
        )
    if size:
        rows.append(
            (
                f"N {size['tokens']}, d {size['width']}, V {size['vocabulary']}, K {size['top_k']}",
                *("", "", ""),
            )
        )
    share = core.get("share of the ceilings", {})
    beside = {}
    if share:
        beside["core"] = (
            f"{share['matrix']:.0%} of the matrix ceiling, {share['copy']:.0%} of the copy "
            f"ceiling; both floors together {share['both_ms']:.1f} ms"
        )
    for name, value in core.items():
        if isinstance(value, dict) and "median_ms" in value:
            rows.append((f"  {name}", *_timing(value), beside.get(name, "")))
        elif isinstance(value, dict) and "times_slower" in value:
            rows.append(
                (
                    f"  {name}, N {value['tokens']}",
                    *_timing(value["theirs"]),
                    f"ours {value['ours']['median_ms']:.1f} ms, {value['ours']['peak_mb']:.0f} MB: "
                    f"{value['times_slower']:.1f} × faster, {_share(value['times_memory'])}",
                )
            )
    return rows + _failed(core)


def _step_rows(record: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    policy = record.get("policy")
    if policy is None:
        return _failed(record)
    rows = [
        (
            f"{policy['name']}, {policy['parameters'] / 1e9:.2f} B, {policy['tokens']} tokens a step",
            *("", "", ""),
        )
    ]
    found = record.get("steps", {})
    plain = found.get(PLAIN, {})
    for name, step in found.items():
        extra = ""
        if step["peak_mb"] is not None and name != PLAIN:
            extra = f"{max(0.0, step['peak_mb'] - plain['peak_mb']):.0f}"
        parts = "; ".join(f"{k} {v:.2%}" for k, v in step["parts_of_a_plain_step"].items())
        ends = step["overheads"] or [0.0]
        turns = f"{min(ends):+.2%} to {max(ends):+.2%}" if len(ends) > 1 else "one turn"
        said = f"{step['overhead']:+.2%} of the step ({turns})"
        if name == PLAIN:
            said = f"differs from its turn before by {turns}"
        rows.append(
            (f"  {name}", f"{step['step_ms']:.1f}", extra, said + (f": {parts}" if parts else ""))
        )
    return rows + _failed(record)


def _share(times: float) -> str:
    """How much memory ours takes of theirs, which takes ``times`` as much."""
    return f"1/{times:.0f} of the memory" if times >= 1.5 else f"{1.0 / times:.1f} × the memory"


def _failed(record: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    return [(f"  {n}", "", "", f"failed: {e[:90]}") for n, e in record.get("failed", {}).items()]


def _timing(value: dict[str, Any]) -> tuple[str, str]:
    return f"{value['median_ms']:.2f}", f"{value['peak_mb']:.0f}"


def verdicts(records: dict[str, dict[str, Any]]) -> list[str]:
    """What was asked, and what was found."""
    lines = []
    naive = records.get("core", {}).get("naive")
    if naive:
        faster, memory = naive["times_slower"], naive["times_memory"]
        lines += [
            f"- At least 5 × faster than the naive form: **{_met(faster >= ASKED['naive_faster'])}** "
            f"({faster:.1f} × at N = {naive['tokens']}).",
            f"- At most 1/50 of its memory: **{_met(memory >= ASKED['naive_memory'])}** "
            f"(1/{memory:.0f}).",
        ]
    for name in sorted(name for name in records if name.startswith("step")):
        record = records[name]
        for variant, step in record.get("steps", {}).items():
            said = f"- {record['policy']['name']}, {variant}: "
            if variant == PLAIN:
                ends = step["overheads"] or [0.0]
                said += f"{min(ends):+.2%} to {max(ends):+.2%} from turn to turn, the noise of the others."
            else:
                said += (
                    "at most 1 % of the update step: "
                    f"**{_met(step['overhead'] <= ASKED['overhead'])}** ({step['overhead']:+.2%})."
                )
            lines.append(said)
    return lines


def _stages(records: dict[str, dict[str, Any]]) -> list[str]:
    """When and where each stage ran, which need not have been together."""
    lines = ["| stage | scale | device | started | |", "|---|---|---|---|---|"]
    for name, record in records.items():
        about = record.get("about")
        if about is None:
            continue
        missing = record.get("left out for want of time", [])
        said = "whole" if record.get("complete") else "in part"
        if missing:
            said = "without " + "; ".join(missing)
        started, where = about["started"][:16], about["device"]
        lines.append(f"| {name} | {record['scale']} | {where} | {started} | {said} |")
    for index, policy in enumerate(sizes_of("full").policies):
        dry = any(record.get("scale") == "tiny" for record in records.values())
        if f"step{index}" not in records and not dry:
            lines.append(f"| step{index} | | | | **not run**: the update step of {policy.name} |")
    return lines


def _met(yes: bool) -> str:
    return "met" if yes else "not met"


def write_report(output: Path) -> None:
    """``README.md`` beside the records."""
    records = load(output)
    about: dict[str, Any] = next((r["about"] for r in records.values() if "about" in r), {})
    dry = any(r.get("scale") == "tiny" for r in records.values())
    versions = ", ".join(f"{k} {v}" for k, v in about.get("packages", {}).items())
    notes = output / "NOTES.md"
    verdict = records.get("verdict", {})
    checks = [
        f"- {name}: {value}"
        for name, value in verdict.items()
        if name not in ("stage", "scale", "complete")
    ]
    lines = [
        "# On a GPU",
        "",
        f"**{DRY}**\n" if dry else "",
        "What the curvature costs beside a large policy. `benchmarks/gpu.sh` makes everything here",
        "anew, the checks first.",
        "",
        f"Device: {about.get('device')}"
        + (f", {about['device_memory_gib']} GiB" if "device_memory_gib" in about else "")
        + f". {versions}, triton {about.get('triton')}, CUDA {about.get('cuda')}, "
        f"Python {about.get('python')}.",
        "",
        *_stages(records),
        "",
        *([notes.read_text().strip(), ""] if notes.exists() else []),
        "## Checks",
        "",
        *checks,
        "",
        "## Asked and found",
        "",
        *verdicts(records),
        "",
        "## Table",
        "",
        "```text",
        table(output),
        "```",
        "",
        "Times are medians by device events after a warm-up; memory is what a call needs above what was",
        "there before it. An update step is forward, loss, backward and optimizer in bf16 with gradient",
        "checkpointing, on completions that are given; trainers take turns on one model, and an overhead",
        "is over the turns of `GRPOTrainer` before and after. Raw numbers are in the records beside this.",
        "",
    ]
    (output / "README.md").write_text("\n".join(lines))
