"""The findings as text: sections, one line each, and below it what to do."""

from __future__ import annotations

import platform
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.text import Text

import capo
from capo.doctor.finding import Finding, State

WORDS: dict[State, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "absent": ("absent", "dim"),
    "broken": ("BROKEN", "bold red"),
    "untried": ("untried", "yellow"),
}
NAME, STATE = 22, 9  # columns


def heading() -> str:
    """What and where."""
    where = f"{platform.system()} {platform.machine()}"
    return f"capo {capo.__version__}, Python {platform.python_version()}, {where}"


class Printer:
    """Prints findings as they come.

    Args:
        console: where to.
    """

    def __init__(self, console: Console) -> None:
        """Print the heading."""
        self.console = console
        self.section = ""
        console.print(heading(), highlight=False)

    def finding(self, found: Finding) -> None:
        """A line, and its fix."""
        if found.section != self.section:
            self.section = found.section
            self.console.print(f"\n[bold]{escape(found.section)}[/bold]")
        word, style = WORDS[found.state]
        line = Text("  ").append(word.ljust(STATE), style=style).append(found.name.ljust(NAME))
        line.append(found.found)
        self._print(line)
        if found.fix:
            self._print(Text(" " * (2 + STATE)).append("→ ", style="bold").append(found.fix))

    def _print(self, line: Text) -> None:
        if self.console.is_terminal:
            self.console.print(Padding(line, (0, 0, 0, 0)), highlight=False)
        else:
            self.console.print(line, highlight=False, soft_wrap=True)

    def end(self, findings: Sequence[Finding]) -> None:
        """The sum."""
        self.console.print(f"\n{summary(findings)}", highlight=False)


def summary(findings: Sequence[Finding]) -> str:
    """One sentence."""
    broken = [found.name for found in findings if found.state == "broken"]
    absent = sum(found.state == "absent" for found in findings)
    if broken:
        return f"{len(broken)} broken: {', '.join(broken)}. What to do stands below each."
    rest = f"; {absent} things are not installed, and need not be" if absent else ""
    return f"Everything that is installed works{rest}."
