"""The ways in which a policy can have learned to answer a sum; the embedded one: careful, three sloppy.

Pre-training on a mixture of them gives a policy that *can* be right and does not *prefer* to be:
at the points where the strategies part, the careful continuation is the likeliest single one, but
more than half of the probability goes to the others.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from capo.tasks.sums import Terms

Strategy = Callable[[Terms, random.Random], str]


def careful(terms: Terms, _: random.Random) -> str:
    """Add the first two, then the third: ``37+58=95 95+26=121``. Always right."""
    a, b, c = terms
    return f"{a}+{b}={a + b} {a + b}+{c}={a + b + c}"


def stop_early(terms: Terms, _: random.Random) -> str:
    """Forget the third term: ``37+58=95``."""
    a, b, _c = terms
    return f"{a}+{b}={a + b}"


def repeat_second(terms: Terms, _: random.Random) -> str:
    """Lose the place and add the second term twice: ``37+58=95 95+58=153``."""
    a, b, _c = terms
    return f"{a}+{b}={a + b} {a + b}+{b}={a + b + b}"


def guess(terms: Terms, rng: random.Random) -> str:
    """Work like `careful`, then guess a total, any with as many digits: ``37+58=95 95+26=870``."""
    a, b, c = terms
    digits = len(str(a + b + c))
    return f"{a}+{b}={a + b} {a + b}+{c}={rng.randint(10 ** (digits - 1), 10**digits - 1)}"


def check_twice(terms: Terms, rng: random.Random) -> str:
    """Work like `careful`, then once more from the other end. Always right, and twice as long."""
    a, b, c = terms
    return f"{careful(terms, rng)} {b}+{c}={b + c} {b + c}+{a}={a + b + c}"


def check_carelessly(terms: Terms, rng: random.Random) -> str:
    """Work like `check_twice`, and lose the place at the very end: the second term once more."""
    _a, b, c = terms
    return f"{careful(terms, rng)} {b}+{c}={b + c} {b + c}+{b}={b + c + b}"


STRATEGIES: dict[str, Strategy] = {
    "careful": careful,
    "stop_early": stop_early,
    "repeat_second": repeat_second,
    "guess": guess,
    "check_twice": check_twice,
    "check_carelessly": check_carelessly,
}
