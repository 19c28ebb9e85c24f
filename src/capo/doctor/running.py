"""Tries a plan in worker processes: one that dies or hangs is a finding, and the rest goes on."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

from capo.doctor.finding import Finding
from capo.doctor.plan import Probe, plan

Environment = tuple[tuple[str, str], ...]


def examine(
    hear: Callable[[str], None] = lambda _: None, wanted: list[Probe | Finding] | None = None
) -> Iterator[Finding]:
    """Try everything.

    Args:
        hear: told what is tried next.
        wanted: what to try; None: everything.

    Yields:
        a finding for each thing, in the report's order.
    """
    states: dict[str, str] = {}
    workers: dict[str, Worker] = {}
    try:
        for each in plan() if wanted is None else wanted:
            found = each
            if isinstance(each, Probe):
                hear(f"{each.section}: {each.name}")
                lacking = [name for name in each.needs if states.get(name, "ok") != "ok"]
                if lacking:
                    what = f"not tried without {' and '.join(lacking)}"
                    found = Finding(each.section, each.name, "untried", what)
                else:
                    worker = workers.setdefault(each.process, Worker(each.environment))
                    found = worker.try_out(each)
            assert isinstance(found, Finding)
            states.setdefault(found.name, found.state)
            yield found
    finally:
        for worker in workers.values():
            worker.end()


class Worker:
    """A process that tries one thing after another, begun anew where one of them ended it."""

    def __init__(self, environment: Environment) -> None:
        """Start nothing yet."""
        self.environment = dict(environment)
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str | None] = queue.Queue()

    def try_out(self, probe: Probe) -> Finding:
        """What came of it."""
        process = self._running()
        assert process.stdin is not None
        question = {"call": probe.call, "arguments": probe.arguments}
        found = Finding(probe.section, probe.name, "broken", "", probe.fix)
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            line = self._answers.get(timeout=probe.patience)
        except (queue.Empty, BrokenPipeError) as error:
            self.end()
            slow = isinstance(error, queue.Empty)
            what = f"no answer within {probe.patience:.0f} s" if slow else "its process died"
            return replace(found, found=what)
        if line is None:
            code = process.wait()
            self.end()
            return replace(found, found=f"its process died ({_death(code)})")
        answer = json.loads(line)
        state = answer["state"]
        fix = "" if state == "ok" else probe.fix
        return replace(found, state=state, found=answer["found"], fix=fix)

    def end(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "capo.doctor.worker"],
                env={**os.environ, **self.environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            self._answers = queue.Queue()
            threading.Thread(
                target=_listen, args=(self._process, self._answers), daemon=True
            ).start()
        return self._process


def _listen(process: subprocess.Popen[str], answers: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        answers.put(line)
    answers.put(None)


def _death(code: int) -> str:
    try:
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"
    except ValueError:
        return f"signal {-code}"
