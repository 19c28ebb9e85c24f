"""Worker processes: whose job dies, and whose does not."""

from __future__ import annotations

import os
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
from pool_kit import attempts, die_once, make, wait

from capo.lab.pool import Failure, Workers, working


def outcomes(workers: Workers, jobs: list[int]) -> dict[int, object]:
    """What became of the jobs."""
    for job in jobs:
        workers.submit(job)
    found: dict[int, object] = {}
    while workers.running:
        found |= dict(workers.finished(10.0))
    return found


@pytest.mark.parametrize("jobs", [1, 2, 3])
@pytest.mark.parametrize("deadly", [(0,), (4, 5)])
def test_only_the_job_that_always_dies_fails(tmp_path: Path, jobs: int, deadly: tuple[int, ...]):
    with working(jobs, make, deadly, tmp_path) as workers:
        found = outcomes(workers, list(range(12)))
    assert sorted(found) == list(range(12))
    for job, outcome in found.items():
        if job in deadly:
            assert isinstance(outcome, Failure)
            assert isinstance(outcome.error, BrokenProcessPool)
            assert attempts(job, tmp_path) == 2
        else:
            assert isinstance(outcome, tuple)
            assert outcome[0] == job**2
            assert attempts(job, tmp_path) == 1  # nobody's death is another's attempt


def test_a_job_that_dies_once_is_made_at_the_end(tmp_path: Path):
    with working(2, die_once, (0, 1), tmp_path) as workers:
        found = outcomes(workers, list(range(5)))
    assert [outcome[0] for _, outcome in sorted(found.items())] == [0, 1, 4, 9, 16]
    assert set(list(found)[-2:]) == {0, 1}


def test_what_raises_is_not_tried_again(tmp_path: Path):
    with working(1, make, (), tmp_path) as workers:
        found = outcomes(workers, [-1, 2])
    assert isinstance(found[-1], Failure)
    assert found[-1].message == "ValueError: -1 is negative"
    assert found[2][0] == 4
    assert attempts(-1, tmp_path) == 1


def test_jobs_come_in_order_and_processes_are_reused(tmp_path: Path):
    with working(1, make, (), tmp_path) as workers:
        found = outcomes(workers, [3, 1, 2])
        assert list(found) == [3, 1, 2]
        (process,) = {outcome[1] for outcome in found.values()}
        found = outcomes(workers, [5])  # after a pause
        assert found[5] == (25, process)
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_a_process_that_dies_idle_is_replaced(tmp_path: Path):
    with working(1, make, (), tmp_path) as workers:
        (_, (_, process)) = next(iter(outcomes(workers, [1]).items()))
        os.kill(process, 9)
        found = outcomes(workers, [2])
    assert found[2][0] == 4


def test_stop_ends_what_is_at_work(tmp_path: Path):
    with working(2, wait, tmp_path) as workers:
        for job in range(5):
            workers.submit(job)
        while len(list(tmp_path.iterdir())) < 2:
            assert workers.finished(0.1) == []
        assert workers.running == 5
    for each in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(each.name), 0)
    assert len(list(tmp_path.iterdir())) == 2
