"""A plan as a table for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from capo.planning.work import HELD, Costs, Rates, Term

if TYPE_CHECKING:
    from rich.console import Console

UNITS = ("B", "KB", "MB", "GB", "TB", "PB")
SYMBOLS = {
    "V": "rows of the head",
    "d": "columns of the head",
    "K": "rows that a token is judged by",
    "P": "parameters",
    "P_active": "that a token passes through, below the head",
    "P_module": "of the largest module",
    "n": "completion tokens of a micro-batch on a device",
    "A": "micro-batches a step",
    "M": "tokens on which a device tries a step",
    "S": "completions on which a device tries a step",
    "F": "forward passes for it",
    "N": "devices",
}


def size(number: float, units: tuple[str, ...] = UNITS, base: float = 1000.0) -> str:
    """``1.2 GB``: three digits and a unit."""
    for unit in units:
        if abs(number) < base or unit == units[-1]:
            return f"{number:.3g} {unit}"
        number /= base
    raise AssertionError(units)


def time(seconds: float) -> str:
    """``1.2 ms``: three digits and a unit."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return "-" if seconds == 0 else f"{seconds * 1e9:.2g} ns"


def show(costs: Costs, rates: Rates, console: Console) -> None:
    """Print every term, and the sums."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, padding=(0, 1))
    for head in ("", "how it is counted"):
        table.add_column(head, overflow="fold")
    for head in ("memory", "when", "a step"):
        table.add_column(head, justify="left" if head == "when" else "right", overflow="fold")
    part = ""
    for term in costs.terms:
        if term.part != part:
            part = term.part
            table.add_row(
                f"[bold]{part}[/bold]",
                "",
                f"[bold]{size(costs.peak(part))}[/bold]",
                f"[bold]at most; {size(costs.held(part))} held[/bold]",
                f"[bold]{time(costs.seconds(rates, part))}[/bold]",
            )
        table.add_row(*_row(term, rates))
    console.print(table)
    update, added = costs.plain_seconds(rates), costs.seconds(rates)
    symbols = "; ".join(f"{k} = {value:,} {SYMBOLS[k]}" for k, value in costs.symbols.items())
    whole = costs.plain_memory + costs.peak()
    lines = [
        f"Adds at most {size(costs.peak())} a device, of it {size(costs.held())} held, to "
        f"{size(costs.plain_memory)} of weights, gradients and Adam's moments (activations come on top).",
        f"Adds about {time(added)} to an update of {time(update)} on {rates.name}: "
        f"× {1 + added / update:.2f} (writing the completions takes as long as before).",
    ]
    if rates.memory is not None and whole > rates.memory:
        lines.append(
            f"Does not fit: {size(whole)} before any activation, and an {rates.name} has "
            f"{size(rates.memory)}. More --gpus, --moments optimizer or --no-selection take less."
        )
    lines.append(f"Bytes unless a unit is said; {symbols}.")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _row(term: Term, rates: Rates) -> tuple[str, ...]:
    moment = "always" if term.phase == HELD else term.phase.removeprefix(f"{term.part}: ")
    return (
        f"  {term.name}",
        term.formula,
        size(term.memory) if term.memory else "-",
        moment if term.memory else "",
        time(term.seconds(rates)),
    )
