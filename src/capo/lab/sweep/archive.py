"""Finished points in one small file: what grids and figures read of them, without policies and tokens.

The same points give the same bytes, and a point is taken out whole or not at all.
"""

from __future__ import annotations

import io
import json
import lzma
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from capo.core.errors import InputError
from capo.lab.rundir import RunDirectory, written_aside
from capo.lab.sweep.execute import MARK, MEASURED, mark_of
from capo.lab.sweep.point import Point

READ = (
    *("config.json", "provenance.json", "status.json", "evals.jsonl", "metrics.jsonl"),
    *(MEASURED, MARK),
)
"""What is kept of a point; `MARK` comes last, as it does in a run."""


@dataclass(frozen=True)
class Unpacked:
    """What taking points out of an archive came to: new ones, and ones that were there already."""

    new: int
    there: int


def pack(points: Iterable[Point], runs: Path, archive: Path) -> int:
    """Write the points that are over to a ``.tar.xz`` file; return how many these are.

    Args:
        points: of a grid; what of them is not over is left out.
        runs: the folder of all run directories.
        archive: the file; it appears whole or not at all.

    Raises:
        InputError: no point is over, or the file cannot be written.
    """
    over = {
        point.folder(): point
        for point in points
        if mark_of(RunDirectory(runs / point.folder()), point) is not None
    }
    if not over:
        raise InputError("--runs", f"no point of the grid is over in {str(runs)!r}.")
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(archive) as aside, tarfile.open(aside, "w:xz", preset=9) as tar:
            for folder in sorted(over):
                for name in READ:
                    path = runs / folder / name
                    if path.is_file():
                        _add(tar, f"{folder}/{name}", _elsewhere(path.read_bytes(), runs))
    except OSError as error:
        raise InputError(
            "--output", f"{str(archive)!r} cannot be written: {error.strerror}."
        ) from None
    return len(over)


def unpack(archive: Path, runs: Path) -> Unpacked:
    """Put the points of an archive among the run directories, where grids find them.

    A point that is over there already stays as it is; one that is half-finished is replaced.

    Raises:
        InputError: the file is no archive of points, or a process is at work in a point.
    """
    if not archive.is_file():
        raise InputError("ARCHIVE", f"{str(archive)!r} is no file.")
    runs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=runs) as scratch:
        folders = _extract(archive, Path(scratch))
        new = [folder for folder in folders if not (runs / folder / MARK).is_file()]
        for folder in new:
            _place(Path(scratch) / folder, RunDirectory(runs / folder))
    return Unpacked(len(new), len(folders) - len(new))


def _elsewhere(content: bytes, runs: Path) -> bytes:
    """Without this machine's own path to the runs."""
    return content.replace(str(runs).encode(), b"runs") if runs.is_absolute() else content


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def _extract(archive: Path, scratch: Path) -> list[str]:
    """The archive's files below ``scratch``; the points that it holds."""
    try:
        with tarfile.open(archive, "r:xz") as tar:
            for entry in tar:
                parts = PurePosixPath(entry.name).parts
                if not entry.isreg() or len(parts) != 2 or ".." in parts or parts[1] not in READ:
                    raise InputError(
                        "ARCHIVE", f"{str(archive)!r} holds {entry.name!r}, which is no point's."
                    )
                tar.extract(entry, scratch, filter="data")
        folders = sorted(each.name for each in scratch.iterdir())
        marks = [json.loads((scratch / f / MARK).read_text(encoding="utf-8")) for f in folders]
    except InputError:
        raise
    except (tarfile.TarError, lzma.LZMAError, EOFError, OSError, ValueError) as error:
        raise InputError(
            "ARCHIVE", f"{str(archive)!r} is no archive of points: {type(error).__name__}."
        ) from None
    for folder, mark in zip(folders, marks, strict=True):
        if not folder.endswith(f"-{mark.get('fingerprint')}"):
            raise InputError("ARCHIVE", f"{folder!r} in {str(archive)!r} holds another point.")
    return folders


def _place(taken: Path, directory: RunDirectory) -> None:
    with directory.locked():
        directory.clear()
        for name in READ:  # the mark last: only with it the point is over
            if (taken / name).is_file():
                (taken / name).replace(directory.path / name)
