"""``capo plan``: what CAPO would add to a job, before it is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from capo.cli import completing
from capo.cli.training import AsJson


def plan(
    *,
    model: Annotated[
        Path, typer.Option(help="A model's config.json, or the directory that has it.")
    ],
    gpus: Annotated[int, typer.Option(help="Devices, one process each.")] = 1,
    sharding: Annotated[
        str, typer.Option(help="ddp, fsdp2, zero2 or zero3.", autocompletion=completing.shardings)
    ] = "fsdp2",
    precision: Annotated[
        str,
        typer.Option(
            help="mixed (float32 weights, bf16 passes), bf16 or float32.",
            autocompletion=completing.precisions,
        ),
    ] = "mixed",
    completions: Annotated[
        int, typer.Option(help="Completions of an optimizer step, on all devices.")
    ] = 512,
    group: Annotated[int, typer.Option(help="Completions of a prompt.")] = 8,
    micro_batch: Annotated[int, typer.Option(help="Completions of a pass on a device.")] = 4,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt, on average.")] = 256,
    length: Annotated[int, typer.Option(help="Tokens of a completion, on average.")] = 1024,
    iterations: Annotated[int, typer.Option(help="Optimizer steps on the same completions.")] = 4,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing/--no-checkpointing", help="Of activations.")
    ] = True,
    top_k: Annotated[int, typer.Option(help="Vocabulary rows a token is judged by.")] = 50,
    selection: Annotated[
        bool, typer.Option("--selection/--no-selection", help="Judge and mask tokens.")
    ] = True,
    moments: Annotated[str, typer.Option(help="simulated or optimizer.")] = "simulated",
    trust_region: Annotated[
        bool, typer.Option("--trust-region/--no-trust-region", help="Keep steps within a shift.")
    ] = True,
    sequences: Annotated[
        int | None, typer.Option(help="Completions a step is tried on; as CAPO does if not given.")
    ] = None,
    monitor: Annotated[bool, typer.Option(help="Count a CurvatureMonitor (one process).")] = False,
    device: Annotated[
        str,
        typer.Option(
            help="a100, h100, h200, b200, or a JSON file of rates.",
            autocompletion=completing.devices,
        ),
    ] = "h100",
    as_json: AsJson = False,
) -> None:
    """Say what CAPO adds to a job in memory and time, term by term, on one device."""
    from capo.planning.architecture import read_architecture
    from capo.planning.costs import costs_of
    from capo.planning.job import Job
    from capo.planning.work import device_rates

    job = Job(
        gpus=gpus,
        sharding=sharding,  # type: ignore[arg-type]
        precision=precision,  # type: ignore[arg-type]
        completions=completions,
        prompt=prompt,
        length=length,
        group=group,
        micro_batch=micro_batch,
        iterations=iterations,
        checkpointing=checkpointing,
        top_k=top_k,
        selection=selection,
        moments=moments,  # type: ignore[arg-type]
        trust_region=trust_region,
        sequences=sequences,
        monitor=monitor,
    )
    architecture, rates = read_architecture(model), device_rates(device, gpus)
    costs = costs_of(architecture, job)
    if as_json:
        from dataclasses import asdict

        document = {"model": asdict(architecture), "job": asdict(job), **costs.document(rates)}
        typer.echo(json.dumps(document))
        return
    from rich.console import Console

    from capo.planning.table import show

    typer.echo(
        f"{architecture.name}: {architecture.parameters / 1e9:.3g} B parameters, "
        f"{architecture.active / 1e9:.3g} B a token, {gpus} × {device}, {sharding}, {precision}"
    )
    console = Console()
    show(costs, rates, Console(width=None if console.is_terminal else 140))


def register(app: typer.Typer) -> None:
    """Add this command to ``app``."""
    app.command()(plan)
