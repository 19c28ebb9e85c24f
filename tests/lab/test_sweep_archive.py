"""Points packed, carried away, and found again."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from sweep_kit import GRID, write_grid
from typer.testing import CliRunner

from capo.cli.main import app
from capo.core.errors import InputError
from capo.lab.rundir import RunDirectory
from capo.lab.sweep.archive import pack, unpack
from capo.lab.sweep.drive import sweep
from capo.lab.sweep.execute import MARK, Mark
from capo.lab.sweep.grid import parse_grid
from capo.lab.sweep.point import Point
from capo.lab.sweep.reading import read_grid
from capo.lab.sweep.watching import Watcher

GRID_OF_FOUR = parse_grid(GRID.replace("[1e-4, 1e-3]", "[1e-3]"))
POINTS = GRID_OF_FOUR.points()


def finished(point: Point, runs: Path) -> RunDirectory:
    """TEST DATA: a point as a sweep leaves it, its figures invented."""
    directory = RunDirectory(runs / point.folder())
    directory.path.mkdir(parents=True)
    directory.write("config.json", {"point": point.name})
    directory.write("provenance.json", {"git_commit": "0123"})
    directory.set_status("finished", 4, 4)
    for step in range(5):
        row = {"step": step, "completions": 16 * step, "accuracy": 0.1 * step, "stderr": 0.0}
        directory.append("evals.jsonl", row | {"seconds": 1.0})
        directory.append("metrics.jsonl", {"step": step, "reward": 0.5 + point.seed})
    directory.tokens.mkdir()
    (directory.tokens / "step-000001.npz").write_bytes(b"many")
    directory.write(MARK, vars(Mark(point.fingerprint(), "steps", 3.0, {})))
    return directory


@pytest.fixture
def runs(tmp_path):
    for point in POINTS[:3]:
        finished(point, tmp_path / "runs")
    return tmp_path / "runs"


def test_what_was_packed_is_read_alike_and_not_run_again(runs, tmp_path):
    archive = tmp_path / "deep" / "points.tar.xz"
    assert pack(POINTS, runs, archive) == 3
    other = tmp_path / "other"
    taken = unpack(archive, other)
    assert (taken.new, taken.there) == (3, 0)
    here, there = read_grid(GRID_OF_FOUR, runs), read_grid(GRID_OF_FOUR, other)
    assert here.runs == there.runs
    assert len(there.runs) == 3
    assert not list(other.glob("*/tokens"))
    assert sorted(path.name for path in other.iterdir()) == sorted(p.folder() for p in POINTS[:3])
    made: list[Point] = []

    def record(point: Point, *_: object) -> Mark:
        made.append(point)
        return Mark(point.fingerprint(), "steps", 1.0, {})

    swept = sweep(POINTS[:3], other, 1, Watcher(), make=record)
    assert (swept.found, made) == (3, [])


def test_the_same_points_give_the_same_bytes(runs, tmp_path):
    one, two = tmp_path / "one.tar.xz", tmp_path / "two.tar.xz"
    pack(POINTS, runs, one)
    pack(POINTS[::-1], runs, two)
    assert one.read_bytes() == two.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.tar.xz", "runs", "two.tar.xz"]


def test_the_path_of_this_machine_stays_here(runs, tmp_path):
    directory = RunDirectory(runs / POINTS[0].folder())
    directory.write("config.json", {"policy": {"path": str(runs / "policies" / "0")}})
    archive, other = tmp_path / "points.tar.xz", tmp_path / "other"
    pack(POINTS, runs, archive)
    unpack(archive, other)
    taken = RunDirectory(other / POINTS[0].folder())
    assert taken.read("config.json") == {"policy": {"path": "runs/policies/0"}}


def test_what_is_over_stays_and_what_is_half_finished_is_replaced(runs, tmp_path):
    archive, other = tmp_path / "points.tar.xz", tmp_path / "other"
    pack(POINTS, runs, archive)
    own = finished(POINTS[0], other)
    own.write("provenance.json", {"git_commit": "own"})
    half = finished(POINTS[1], other)
    (half.path / MARK).unlink()
    (half.checkpoints / "checkpoint-2").mkdir(parents=True)
    half.append("evals.jsonl", {"step": 9})
    taken = unpack(archive, other)
    assert (taken.new, taken.there) == (2, 1)
    assert own.read("provenance.json") == {"git_commit": "own"}
    assert half.rows("evals.jsonl") == RunDirectory(runs / POINTS[1].folder()).rows("evals.jsonl")
    assert not half.checkpoints.exists()


def test_a_process_at_work_in_a_point_is_not_disturbed(runs, tmp_path):
    archive, other = tmp_path / "points.tar.xz", tmp_path / "other"
    pack(POINTS[:1], runs, archive)
    at_work = RunDirectory(other / POINTS[0].folder())
    with at_work.locked(), pytest.raises(InputError, match="another process is at work"):
        unpack(archive, other)
    assert not (at_work.path / MARK).exists()


def altered(archive: Path, to: Path, name: str, content: bytes, kind: bytes = tarfile.REGTYPE):
    """The archive with one entry more."""
    with tarfile.open(archive) as tar, tarfile.open(to, "w:xz") as out:
        for entry in tar:
            out.addfile(entry, tar.extractfile(entry))
        entry = tarfile.TarInfo(name)
        entry.size, entry.type, entry.linkname = len(content), kind, "/etc/passwd"
        out.addfile(entry, io.BytesIO(content))
    return to


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../evals.jsonl", tarfile.REGTYPE),
        ("/tmp/evals.jsonl", tarfile.REGTYPE),
        ("a/b/evals.jsonl", tarfile.REGTYPE),
        ("point/evil.py", tarfile.REGTYPE),
        ("point/lab.json", tarfile.SYMTYPE),
    ],
)
def test_an_archive_of_other_things_leaves_nothing_behind(runs, tmp_path, name, kind):
    archive = tmp_path / "points.tar.xz"
    pack(POINTS, runs, archive)
    bad = altered(archive, tmp_path / "bad.tar.xz", name, b"", kind)
    with pytest.raises(InputError, match="which is no point's"):
        unpack(bad, tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []


def test_a_torn_archive_and_one_of_another_point_are_refused(runs, tmp_path):
    archive, torn = tmp_path / "points.tar.xz", tmp_path / "torn.tar.xz"
    pack(POINTS, runs, archive)
    torn.write_bytes(archive.read_bytes()[:-200])
    foreign = altered(archive, tmp_path / "foreign.tar.xz", "p-0/lab.json", b'{"fingerprint": "1"}')
    unmarked = altered(archive, tmp_path / "unmarked.tar.xz", "p-0/evals.jsonl", b"")
    for bad, why in (
        (torn, "no archive of points"),
        (foreign, "holds another point"),
        (unmarked, "no archive of points"),
        (tmp_path / "none.tar.xz", "is no file"),
    ):
        with pytest.raises(InputError, match=why) as refused:
            unpack(bad, tmp_path / "other")
        assert refused.value.field == "ARCHIVE"
    assert not list((tmp_path / "other").iterdir())


def test_nothing_to_pack_and_nowhere_to_write(runs, tmp_path):
    with pytest.raises(InputError, match="no point of the grid is over"):
        pack(POINTS[3:], runs, tmp_path / "points.tar.xz")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        pack(POINTS, runs, tmp_path / "file" / "points.tar.xz")


def test_a_pack_that_fails_leaves_nothing_half_written(runs, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("capo.lab.sweep.archive._add", full)
    with pytest.raises(InputError, match="No space left"):
        pack(POINTS, runs, tmp_path / "out" / "points.tar.xz")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_commands(runs, tmp_path):
    grid = str(write_grid(tmp_path, GRID.replace("[1e-4, 1e-3]", "[1e-3]")))
    archive, other = str(tmp_path / "points.tar.xz"), str(tmp_path / "other")
    packed = CliRunner().invoke(app, ["lab", "pack", grid, "--runs", str(runs), "-o", archive])
    assert packed.output.startswith(f"3 of 4 points in {archive}, ")
    for new, there in ((3, 0), (0, 3)):
        taken = CliRunner().invoke(app, ["lab", "unpack", archive, "--runs", other])
        assert taken.output == f"{new} points now in {other}, {there} were there already\n"
    status = CliRunner().invoke(app, ["lab", "status", grid, "--runs", other, "--json"])
    assert [row["state"] for row in json.loads(status.output)].count("finished") == 3
    unknown = CliRunner().invoke(app, ["lab", "pack", "fig77", "-o", archive])
    assert isinstance(unknown.exception, InputError)
    assert "did you mean 'fig7'" in str(unknown.exception)
