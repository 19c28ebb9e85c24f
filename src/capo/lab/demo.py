"""The demonstration: one policy trained four ways, then one report on all of them.

Conservative GRPO, aggressive GRPO, the paper's token masks in the same aggressive regime, and CAPO as
it ships, with the aggressive learning rate and a quarter of the batch. The verdict says what was
measured, whatever it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from capo.lab.config import Config
from capo.lab.live import View
from capo.lab.progress import Lines, Progress
from capo.lab.rundir import RunDirectory
from capo.lab.sources import load_config

if TYPE_CHECKING:
    from capo.lab.report.summary import Summary

TARGET = 0.75  # accuracy that the runs are raced to
# Directory, preset, overrides. GRPO's tokens are watched too, so that the report can show what its
# steps look like; that changes no weight.
RUNS: tuple[tuple[str, str, list[str]], ...] = (
    ("grpo-conservative", "small-conservative", ["capo.watch=true"]),
    ("grpo-aggressive", "small-aggressive", ["capo.watch=true"]),
    ("paper-masks", "small-aggressive-capo", ["capo.watch=true"]),
    ("capo", "small-capo", ["capo.watch=true"]),
)


def demo_configs() -> dict[str, Config]:
    """The runs of the demonstration by directory name."""
    return {
        name: load_config(preset, [*overrides, f'run.name="{name}"'])
        for name, preset, overrides in RUNS
    }


def run_demo(output: Path, *, overwrite: bool = False, quiet: bool = False) -> Path:
    """Train what is not trained yet, write the report, print its path and the verdict.

    A finished run of the same configuration is kept, an interrupted one continued, any other run
    of the demonstration replaced.

    Returns:
        the report.

    Raises:
        InputError: a directory of the demonstration holds something else.
        Interrupted: a signal stopped it.
    """
    console = Console(stderr=True)
    configs = demo_configs()
    progress = _progress(console, configs, quiet)
    try:
        for name, config in configs.items():
            _train(config, RunDirectory(output / name), progress, overwrite)
    finally:
        if isinstance(progress, View):
            progress.close()
    return _report([output / name for name in configs], output / "report.html")


def _train(config: Config, directory: RunDirectory, progress: Progress, overwrite: bool) -> None:
    from capo.lab.run import recorded_config, train

    same = directory.exists and recorded_config(directory.path).identity() == config.identity()
    resume = same and not overwrite
    if resume and directory.state == "finished":
        progress.said(f"{directory.path.name}: already trained")
        if isinstance(progress, View):
            progress.skipped(config)
        return
    # A run of other settings in the demonstration's own directory is an older demonstration.
    train(
        config,
        directory.path,
        overwrite=not resume,
        resume=resume,
        progress=progress,
    )


def _progress(console: Console, configs: dict[str, Config], quiet: bool) -> Progress:
    if quiet:
        return Progress()
    if not console.is_terminal:
        return Lines(console)
    return View(console, total=sum(c.completions_after(c.steps) for c in configs.values()))


def _report(runs: list[Path], path: Path) -> Path:
    from capo.cli.results import summarise_runs, table_of
    from capo.lab.report import build_report

    title = "CAPO demonstration: one policy, trained four ways"
    build_report(runs, path, title=title, target_accuracy=TARGET)
    summaries = summarise_runs(runs, TARGET)
    console = Console()
    console.print(table_of(summaries, TARGET))
    for sentence in verdict(summaries):
        console.print(f"- {sentence}", highlight=False, soft_wrap=True)
    console.print(f"report: {path}", highlight=False, soft_wrap=True)
    return path


def verdict(summaries: list[Summary]) -> list[str]:
    """What the four runs show, in words, from their figures alone."""
    conservative, aggressive, masks, capo = summaries
    rate = f"learning rate {aggressive.learning_rate}"
    sentences = [
        _course("GRPO in the conservative regime", conservative),
        _course(f"GRPO in the aggressive regime ({rate})", aggressive),
        _course("the paper's token masks in the same regime", masks),
        _course(f"CAPO ({rate}, {capo.completions_per_step} completions a step)", capo),
    ]
    if capo.final is None or aggressive.final is None:
        return sentences
    if not aggressive.collapsed:
        sentences.append("GRPO did not collapse, so that there was nothing to rescue.")
    else:
        for name, run in (("The token masks", masks), ("The trust region", capo)):
            kept = "did not keep" if run.collapsed else "kept"
            sentences.append(f"{name} {kept} the aggressive learning rate from collapsing the run.")
    sentences.append(_efficiency(conservative, capo))
    return sentences


def _efficiency(conservative: Summary, capo: Summary) -> str:
    ours, theirs = capo.completions_to_target, conservative.completions_to_target
    if ours is None:
        return f"CAPO did not reach {TARGET:g}."
    if theirs is None:
        least = f"at least {conservative.completions / ours:.0f} × fewer completions"
        return f"Conservative GRPO did not reach {TARGET:g}; CAPO did, with {least}."
    fewer = f"{theirs / ours:.1f} × fewer completions than conservative GRPO"
    return f"CAPO reached {TARGET:g} with {fewer}."


def _course(name: str, summary: Summary) -> str:
    base, final = summary.base, summary.final
    if base is None or final is None:
        return f"{name}: not evaluated."
    text = f"{name}: accuracy {base.accuracy:.2f} -> {final.accuracy:.2f} ± {final.stderr:.2f}"
    if summary.collapsed_at is not None:
        text += f", collapsed at {summary.collapsed_at.completions:,.0f} completions"
    if summary.completions_to_target is not None:
        text += f", {TARGET:g} after {summary.completions_to_target:,.0f} completions"
    return f"{text}."
