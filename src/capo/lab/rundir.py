"""A run's directory: what is in it, and how it survives a kill at any moment.

JSON files appear whole or not at all (written aside, then renamed). The ``.jsonl`` logs are
appended to, so a killed process may leave lines beyond its last checkpoint, or a torn one:
continuing a run first cuts them back to that checkpoint. A checkpoint counts once it holds its
``complete`` mark.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from capo.core.errors import InputError

State = Literal["running", "interrupted", "finished", "failed"]

OUT_OF_TIME = "the time limit was reached"  # message of a finished run that has steps left
COMPLETE_MARK = "complete"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_TOKENS = re.compile(r"step-(\d+)\.npz")
_LOGS = ("metrics.jsonl", "evals.jsonl", "ledger.jsonl", "alarms.jsonl")
# Everything a run may leave behind, and so all that `--overwrite` removes.
_CONTENTS = (
    "config.json",
    "provenance.json",
    "dirty.diff",
    "status.json",
    "tokens",
    "checkpoints",
    "final",
    "lab.json",
    "measured.json",
    ".lock",
    *_LOGS,
)


@dataclass(frozen=True)
class RunDirectory:
    """Paths and bookkeeping of one run directory."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Where the trainer saves to."""
        return self.path / "checkpoints"

    @property
    def tokens(self) -> Path:
        """Where the per-token records are."""
        return self.path / "tokens"

    @property
    def final(self) -> Path:
        """The trained policy: a Hugging Face model directory with its tokenizer."""
        return self.path / "final"

    @property
    def exists(self) -> bool:
        """Whether there is a run here: a model's directory has a ``config.json`` too, but no status."""
        return all((self.path / name).is_file() for name in ("config.json", "status.json"))

    def check_free(self, overwrite: bool) -> None:
        """Refuse a directory that a new run may not use. Changes nothing.

        Raises:
            InputError: a run is here and ``overwrite`` is False, or what is here is no run's.
        """
        nearest = self.path
        while not nearest.exists():
            nearest = nearest.parent
        if not nearest.is_dir():
            raise InputError("output", f"{str(nearest)!r} is a file; give a directory.")
        if not os.access(nearest, os.W_OK):
            raise InputError("output", f"{str(nearest)!r} is not writable; give another directory.")
        if nearest != self.path:
            return
        foreign = sorted(p.name for p in self.path.iterdir() if not _is_ours(p.name))
        if foreign:
            raise InputError(
                "output",
                f"{str(self.path)!r} holds files that are no run's ({foreign[0]!r}); "
                "give another directory.",
            )
        if any(self.path.iterdir()) and not overwrite:
            raise InputError(
                "output",
                f"there is a run in {str(self.path)!r} already; "
                "continue it with --resume, replace it with --overwrite, or give another.",
            )

    def clear(self) -> None:
        """Remove everything a run has written here, the checkpoints included."""
        for name in _CONTENTS:
            entry = self.path / name
            if entry.is_dir():
                shutil.rmtree(entry)
            elif name != ".lock":  # held by this process
                entry.unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory against other processes; the lock dies with this one.

        Raises:
            InputError: another process is at work here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    "output", f"another process is at work in {str(self.path)!r}; wait for it."
                ) from None
            yield

    @contextmanager
    def waited(self) -> Iterator[None]:
        """Hold the directory, after whoever holds it now."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def read(self, name: str) -> dict[str, Any]:
        """One of the JSON files, ``{}`` where it is missing."""
        path = self.path / name
        if not path.is_file():
            return {}
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return document

    def write(self, name: str, document: dict[str, Any]) -> None:
        """One of the JSON files, whole or not at all."""
        write_text(self.path / name, json.dumps(document, indent=2) + "\n")

    def append(self, name: str, row: dict[str, Any]) -> None:
        """One line of a log. Values that are not finite stay so (Python's JSON dialect)."""
        with (self.path / name).open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The readable lines of a log; a torn last line is left out."""
        path = self.path / name
        if not path.is_file():
            return []
        rows = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break  # a kill tore it, and nothing whole can follow
        return rows

    def set_status(self, state: State, step: int, steps: int, message: str = "") -> None:
        """``status.json``."""
        document = {"state": state, "step": step, "steps": steps, "message": message}
        self.write("status.json", document)

    @property
    def state(self) -> str:
        """The state in ``status.json``, ``""`` without one."""
        return str(self.read("status.json").get("state", ""))

    @property
    def out_of_time(self) -> bool:
        """Whether the run ended because its time was over."""
        return self.state == "finished" and self.read("status.json")["message"] == OUT_OF_TIME

    def last_checkpoint(self) -> tuple[int, Path | None]:
        """Step and path of the newest complete checkpoint, ``(0, None)`` where there is none."""
        complete = [
            (step, path)
            for step, path in self._checkpoint_paths()
            if (path / COMPLETE_MARK).is_file()
        ]
        return max(complete, default=(0, None), key=lambda pair: pair[0])

    def mark_complete(self, step: int) -> None:
        """Declare the checkpoint of ``step`` whole and drop the older ones."""
        write_text(self.checkpoints / f"checkpoint-{step}" / COMPLETE_MARK, "")
        for other, path in self._checkpoint_paths():
            if other < step:
                shutil.rmtree(path)

    def rewind(self, step: int) -> None:
        """Forget whatever was written after ``step``, the step of the last complete checkpoint."""
        for name in _LOGS:
            if not (self.path / name).is_file():
                continue
            # Without a checkpoint the run starts over, evaluation of the base policy included.
            kept = [row for row in self.rows(name) if step > 0 and row["step"] <= step]
            write_text(self.path / name, "".join(json.dumps(row) + "\n" for row in kept))
        for other, path in self._checkpoint_paths():
            if other > step or not (path / COMPLETE_MARK).is_file():
                shutil.rmtree(path)
        for path in self.tokens.glob("step-*.npz"):
            match = _TOKENS.fullmatch(path.name)
            if match and int(match[1]) > step:
                path.unlink()

    def _checkpoint_paths(self) -> list[tuple[int, Path]]:
        found = []
        for path in self.checkpoints.glob("checkpoint-*"):
            match = _CHECKPOINT.fullmatch(path.name)
            if match:
                found.append((int(match[1]), path))
        return found


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to: it takes that one's place, or is gone after a failure."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        yield aside
        aside.replace(path)
    except BaseException:
        with suppress(OSError):  # the failure is the news
            aside.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new."""
    with written_aside(path) as aside, aside.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())


def _is_ours(name: str) -> bool:
    return name in _CONTENTS or (name.startswith(".") and name.endswith(".tmp"))
