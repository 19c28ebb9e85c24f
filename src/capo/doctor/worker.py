"""``python -m capo.doctor.worker``: tries what is asked for on standard input, a JSON line an answer.

Whatever libraries print goes to standard error; the answers have the standard output for themselves.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import TextIO


def main() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        _answer(json.loads(line), answers)


def _answer(asked: dict[str, object], answers: TextIO) -> None:
    from capo.doctor import probes
    from capo.doctor.finding import Absent

    try:
        found = getattr(probes, str(asked["call"]))(*asked["arguments"])  # type: ignore[misc]
        answer = {"state": "ok", "found": found}
    except Absent as why:
        answer = {"state": "absent", "found": str(why)}
    except BaseException as error:  # whatever a broken library may raise, SystemExit included
        first = next(iter(str(error).strip().splitlines()), "")
        answer = {"state": "broken", "found": f"{type(error).__name__}: {first}"}
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
