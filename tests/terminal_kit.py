"""A real pseudo-terminal for a real ``capo`` process, and the screen that its bytes draw."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from run_kit import capo_command

_PIECE = re.compile(
    r"\x1b\[([?\d;]*)([A-Za-z])|\x1b\][^\x07]*\x07|([\r\n\b])|([^\x1b\r\n\b]+)|\x1b"
)


class Screen:
    """What a terminal of endless height shows; knows the controls that `rich` uses.

    Raises:
        AssertionError: a control that it does not know.
    """

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.lines = [""]
        self.row = self.column = 0
        self.cursor_shown = True

    def feed(self, text: str) -> None:
        """Draw."""
        for match in _PIECE.finditer(text):
            argument, command, control, plain = match.groups()
            if plain:
                self._write(plain)
            elif control == "\r":
                self.column = 0
            elif control == "\n":
                self._down()
            elif command:
                self._control(argument, command)

    def _control(self, argument: str, command: str) -> None:
        match command:
            case "m":
                pass  # colour
            case "A":
                self.row = max(0, self.row - int(argument or 1))
            case "K":
                assert argument in ("2", "", "0")
                kept = "" if argument == "2" else self.lines[self.row][: self.column]
                self.lines[self.row] = kept
            case "h" | "l":
                assert argument == "?25", argument
                self.cursor_shown = command == "h"
            case _:
                raise AssertionError(f"unknown control {argument}{command}")

    def _write(self, plain: str) -> None:
        for character in plain:
            if self.column == self.columns:
                self._down()
                self.column = 0
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
            self.column += 1

    def _down(self) -> None:
        self.row += 1
        if self.row == len(self.lines):
            self.lines.append("")

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.lines)


@dataclass
class Shown:
    """What came of a process on a terminal.

    Attributes:
        code: its exit status.
        raw: every byte.
        frames: the screen, whenever the process had written something.
    """

    code: int
    raw: str
    screen: Screen
    frames: list[str] = field(default_factory=list)


def converse(
    command: list[str],
    heard: Callable[[bytes], object],
    *,
    cwd: Path,
    environment: dict[str, str],
    columns: int = 100,
    limit: float = 300,
    keys: str = "",
) -> int:
    """Run a command on a pseudo-terminal of so many columns until it ends; its exit status.

    ``keys`` are typed at once, and ``heard`` is given whatever is written, as it comes.
    """
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen(
        command,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        cwd=cwd,
        env=environment,
        close_fds=True,
        start_new_session=True,
    )
    os.close(slave)
    os.write(master, keys.encode())
    deadline = time.monotonic() + limit
    try:
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([master], [], [], left)[0]:
                break
            try:
                data = os.read(master, 1 << 16)
            except OSError:  # the last process that had the terminal has ended
                break
            if not data:
                break
            heard(data)
        return process.wait(timeout=60)
    finally:
        process.kill()
        process.wait()
        os.close(master)


def on_terminal(*arguments: str, cwd: Path, columns: int = 100, limit: float = 300) -> Shown:
    """Run ``capo`` on a pseudo-terminal of so many columns until it ends."""
    ignored = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
    environment = {name: value for name, value in os.environ.items() if name not in ignored}
    environment |= {"TERM": "xterm-256color", "PYTHONUTF8": "1"}
    shown, rest = Shown(0, "", Screen(columns)), b""

    def draw(data: bytes) -> None:
        nonlocal rest
        text, rest = _decoded(rest + data)
        shown.raw += text
        shown.screen.feed(text)
        shown.frames.append(shown.screen.text)

    command = capo_command(*arguments)
    shown.code = converse(
        command, draw, cwd=cwd, environment=environment, columns=columns, limit=limit
    )
    return shown


def _decoded(data: bytes) -> tuple[str, bytes]:
    """The whole characters and control sequences, and what is cut off behind them."""
    cut = data.rfind(b"\x1b")
    if cut >= 0 and not re.match(rb"\x1b(\[[?\d;]*[A-Za-z]|\][^\x07]*\x07)", data[cut:]):
        data, rest = data[:cut], data[cut:]
    else:
        rest = b""
    for back in range(4):
        try:
            return data[: len(data) - back].decode(), data[len(data) - back :] + rest
        except UnicodeDecodeError:
            continue
    raise AssertionError(data[-8:])
