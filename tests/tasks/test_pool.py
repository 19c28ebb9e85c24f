"""Grading in processes: hostile text costs its own time and nothing else, and nobody is orphaned."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_math_grading import HOSTILE

from capo import InputError
from capo.tasks import load_task
from capo.tasks.pool import GradingPool

LIMIT = 1.0  # CPU seconds


@pytest.fixture(scope="module")
def pool() -> Iterator[GradingPool]:
    pool = GradingPool(2, LIMIT)
    pool.grade([math("\\boxed{1}", "1")] * 8)
    yield pool
    pool.close()


def math(completion: str, answer: str = "42") -> dict[str, str]:
    return {"kind": "math", "completion": completion, "answer": answer}


def gym(answer: str, dataset: str, **parameters: object) -> dict[str, object]:
    entry = [dataset, json.dumps(parameters), 7, 0]
    return {
        "kind": "reasoning_gym",
        "completion": f"<answer>{answer}</answer>",
        "entry": entry,
    }


def pids(pool: GradingPool) -> list[int]:
    return [worker._process.pid for worker in pool._workers if worker._process is not None]


def gone(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


BOMBS = [
    "9^{9^{9^{9^9}}}",
    "9**9**9**9",
    "1e999999999",
    "99999999999!",
    r"\newcommand{\a}{\a\a}\a",
    "\x00" * 1000,
    "\ud800\udfff\ud800",
    "(" * 100_000 + ")" * 100_000,
    "\\frac{1}{" * 30 + "2" + "}" * 30,
    "__import__('os').system('true')",
]


@pytest.mark.parametrize("bomb", [*BOMBS, *HOSTILE, "9" * 10_000_000], ids=lambda text: text[:12])
def test_hostile_text_is_wrong_and_the_worker_lives(pool: GradingPool, bomb: str) -> None:
    before = pids(pool)
    texts = [bomb, f"\\boxed{{{bomb}}}"]
    problem = load_task("sums").eval_problems(1, 0)[0]
    assert pool.grade([math(text[-65536:], problem.answer) for text in texts]) == [0.0, 0.0]
    assert pids(pool) == before  # nothing had to be started anew


def test_a_tower_of_powers_is_interrupted_by_the_kernel(tmp_path: Path) -> None:
    """A grader evaluates a huge integer: one bytecode that no Python signal handler can interrupt."""
    pool = GradingPool(2, LIMIT)
    try:
        pool.grade([gym("1", "countdown"), math("\\boxed{42}")])
        hostile, fine = gym("(((9**99)**99)**99)**99", "countdown"), math("\\boxed{42}")
        finished: list[float] = []

        def others() -> None:
            assert pool.grade([fine] * 200) == [1.0] * 200
            finished.append(time.monotonic())

        thread = threading.Thread(target=others)
        started = time.monotonic()
        thread.start()
        assert pool.grade([hostile]) == [0.0]
        ended = time.monotonic()
        thread.join()
        assert ended - started < 30
        assert finished
        assert finished[0] - started < 30
        assert pool.grade([fine, fine]) == [1.0, 1.0]  # and the pool is whole again
    finally:
        pool.close()


@pytest.mark.parametrize("dataset", ["countdown", "simple_integration", "binary_matrix"])
@pytest.mark.parametrize(
    "code",
    [
        "__import__('pathlib').Path({path!r}).touch()",
        "[open({path!r}, 'w')]",
        "[c for c in ().__class__.__base__.__subclasses__()] or open({path!r}, 'w')",
        "sin('open({path!r}, chr(119))')",
        """'open("{path}", chr(119))'""",
        "5! + (open)(({path!r}), (chr)(119))",
    ],
)
def test_nothing_of_a_completion_is_executed(
    pool: GradingPool, tmp_path: Path, dataset: str, code: str
) -> None:
    path = tmp_path / "touched"
    assert pool.grade([gym(code.format(path=str(path)), dataset)])[0] < 1
    assert not path.exists()


def quoted(code: str) -> str:
    """An answer in quotes that sympy would evaluate where it expects an expression."""
    return repr(f"exec({code!r}) or 0")


def test_an_answer_cannot_change_the_question(pool: GradingPool) -> None:
    code = (
        "import sys\nframe = sys._getframe()\n"
        "while 'integrand' not in frame.f_locals.get('metadata', ()): frame = frame.f_back\n"
        "frame.f_locals['metadata']['integrand'] = '0'"
    )
    assert pool.grade([gym(quoted(code), "simple_integration")]) == [0.0]


def test_an_answer_cannot_take_the_guard_away(pool: GradingPool, tmp_path: Path) -> None:
    path = tmp_path / "touched"
    code = (
        "import sys\nframe = sys._getframe()\n"
        "while 'guard' not in frame.f_locals: frame = frame.f_back\n"
        f"frame.f_locals['guard'].armed = False\nopen({str(path)!r}, 'w')"
    )
    assert pool.grade([gym(quoted(code), "simple_integration")]) == [0.0]
    assert not path.exists()


def test_a_killed_and_a_stopped_worker_are_replaced() -> None:
    pool = GradingPool(2, 0.2)
    try:
        fine = math("\\boxed{42}")
        assert pool.grade([fine] * 4) == [1.0] * 4
        for pid in pids(pool):
            os.kill(pid, signal.SIGKILL)
        assert pool.grade([fine] * 4) == [1.0] * 4
    finally:
        pool.close()
    assert pids(pool) == []
    assert pool.grade([fine]) == [1.0]  # starts again
    pool.close()


@pytest.mark.parametrize("job", ["FINE", "ENDLESS"])
def test_workers_end_with_a_killed_parent(job: str) -> None:
    jobs = {"FINE": math("1", "1"), "ENDLESS": gym("(((9**99)**99)**99)**99", "countdown")}
    code = (
        "import threading, time\n"
        "from capo.tasks.pool import GradingPool\n"
        "pool = GradingPool(2, 2.0)\n"
        f"pool.grade([{jobs['FINE']}, {gym('1', 'countdown')}] * 8)\n"
        f"threading.Thread(target=pool.grade, args=([{jobs[job]}] * 2,), daemon=True).start()\n"
        "time.sleep(0.3)\n"
        "print(*[w._process.pid for w in pool._workers if w._process], flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert workers
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert all(gone(pid, 30) for pid in workers)


def test_a_forked_child_has_workers_of_its_own() -> None:
    code = (
        "import os\n"
        "from capo.tasks.pool import shared_pool\n"
        "job = {'kind': 'math', 'completion': '\\\\boxed{1}', 'answer': '1'}\n"
        "assert shared_pool().grade([job] * 8) == [1.0] * 8\n"
        "mine = {w._process.pid for w in shared_pool()._workers if w._process}\n"
        "child = os.fork()\n"
        "assert shared_pool().grade([job] * 8) == [1.0] * 8\n"
        "theirs = {w._process.pid for w in shared_pool()._workers if w._process}\n"
        "if child == 0:\n"
        "    assert not mine & theirs\n"
        "    shared_pool().close()\n"
        "    os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "assert theirs == mine\n"
        "assert shared_pool().grade([job] * 8) == [1.0] * 8\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_jobs_keep_their_order(pool: GradingPool) -> None:
    answers = [str(i) for i in range(60)]
    jobs = [math(f"\\boxed{{{i}}}", str(i if i % 3 else -7)) for i in range(60)]
    assert pool.grade(jobs) == [float(int(answer) % 3 != 0) for answer in answers]
    assert pool.grade([]) == []


def test_a_grader_that_does_not_exist_is_an_error(pool: GradingPool) -> None:
    with pytest.raises(RuntimeError, match="grading failed KeyError"):
        pool.grade([{"kind": "magic", "completion": ""}])


@pytest.mark.parametrize("arguments", [(0, 1.0), (1, 0.0), (1, float("inf"))])
def test_bad_arguments(arguments: tuple[int, float]) -> None:
    with pytest.raises(InputError):
        GradingPool(*arguments)


def test_an_interrupted_grade_leaves_no_answer_behind() -> None:
    """Else every reward from then on is that of the completion before."""
    pool = GradingPool(1, LIMIT)
    slow = gym("(((9**99)**99)**99)**99", "countdown")
    pool.grade([gym("1", "countdown")])
    assert pool.grade([math("\\boxed{7}", "7")]) == [1.0]

    def interrupt(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(TimeoutError):
            pool.grade([slow])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    found = [pool.grade([math(f"\\boxed{{{n}}}", "7")])[0] for n in (1, 7, 1, 2)]
    assert found == [0.0, 1.0, 0.0, 0.0]
    pool.close()


def test_a_worker_can_write_no_file(pool: GradingPool) -> None:
    """Whatever runs in it: the kernel sees to it, and lets nobody take it back."""
    for pid in pids(pool):
        limits = Path(f"/proc/{pid}/limits").read_text()
        (line,) = [row for row in limits.splitlines() if row.startswith("Max file size")]
        assert line.split()[3:5] == ["0", "0"]
