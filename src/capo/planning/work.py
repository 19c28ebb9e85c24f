"""The work and the memory of one thing that is done, and how long the work takes on a device."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from capo.core.errors import InputError

HELD = "held"
"""The phase of what is held all the time."""


@dataclass(frozen=True)
class Term:
    """One entry of the cost model, for one device and one optimizer step.

    Attributes:
        part: ``"selection"``, ``"trust region"``, ``"monitor"`` or ``"plain"``.
        name: what it is.
        formula: how it is counted, in the symbols of the plan's legend.
        flops: of matrix products of the passes' precision.
        wide_flops: of matrix products in float32.
        moved: bytes read and written by what is not a matrix product.
        linked: bytes that a device sends to others.
        memory: bytes.
        phase: when `memory` is there: :data:`HELD`, or the name of a moment. What is there at the same
            moment adds up.
    """

    part: str
    name: str
    formula: str
    flops: float = 0.0
    wide_flops: float = 0.0
    moved: float = 0.0
    linked: float = 0.0
    memory: float = 0.0
    phase: str = ""

    def seconds(self, rates: Rates) -> float:
        """Time of this term alone."""
        return (
            self.flops / rates.flops
            + self.wide_flops / rates.wide_flops
            + self.moved / rates.bandwidth
            + self.linked / rates.link
        )


@dataclass(frozen=True)
class Rates:
    """What a device really does in a second: attained, not peak.

    Attributes:
        name: of the device.
        flops: of matrix products in the passes' precision.
        wide_flops: of the float32 matrix products of the curvature.
        bandwidth: bytes of its memory.
        link: bytes that it sends to others.
    """

    name: str
    flops: float
    wide_flops: float
    bandwidth: float
    link: float

    def __post_init__(self) -> None:
        """Check every rate."""
        for name in ("flops", "wide_flops", "bandwidth", "link"):
            if not getattr(self, name) > 0:
                raise InputError("--device", f"{name} must be > 0, got {getattr(self, name)!r}.")


# Data sheets (dense bf16, TF32 × 1/3 for the three products of one in float32, memory, NVLink one way),
# times what training jobs attain: 0.4 of the products, 0.7 of memory and links.
_SHEETS = {
    "a100": (312e12, 156e12 / 3, 2.0e12, 300e9),
    "h100": (989e12, 495e12 / 3, 3.35e12, 450e9),
    "h200": (989e12, 495e12 / 3, 4.8e12, 450e9),
    "b200": (2250e12, 1100e12 / 3, 8.0e12, 900e9),
}
ATTAINED_FLOPS, ATTAINED_BYTES = 0.4, 0.7


def device_rates(name: str) -> Rates:
    """The rates of a device by name, or those of a JSON file that `capo bench plan` wrote.

    Raises:
        InputError: neither such a device nor such a file is known.
    """
    if name in _SHEETS:
        flops, wide, memory, link = _SHEETS[name]
        return Rates(
            name,
            flops * ATTAINED_FLOPS,
            wide * ATTAINED_FLOPS,
            memory * ATTAINED_BYTES,
            link * ATTAINED_BYTES,
        )
    try:
        document: Any = json.loads(Path(name).read_text())
        return Rates(**document.get("rates", document))
    except InputError:
        raise
    except (OSError, ValueError, TypeError, AttributeError):
        raise InputError(
            "--device",
            f"must be one of {', '.join(_SHEETS)}, or a JSON file with name, flops, wide_flops, "
            f"bandwidth and link (a second each), got {name!r}.",
        ) from None


@dataclass(frozen=True)
class Costs:
    """The terms of a plan.

    Attributes:
        terms: those of CAPO.
        plain: those of the update without it (rollouts, rewards and old log-probabilities left out).
        plain_memory: bytes of weights, gradients and Adam's moments on one device; no activations.
    """

    terms: list[Term]
    plain: list[Term]
    plain_memory: float
    symbols: dict[str, int] = field(default_factory=dict)

    def of(self, *parts: str) -> list[Term]:
        """The terms of some parts."""
        return [term for term in self.terms if term.part in parts]

    def held(self, *parts: str) -> float:
        """Bytes held all the time, of some parts or of all."""
        return sum(t.memory for t in self._chosen(parts) if t.phase == HELD)

    def phases(self, *parts: str) -> dict[str, float]:
        """Bytes that are there at each moment, besides what is held."""
        found: dict[str, float] = {}
        for term in self._chosen(parts):
            if term.phase not in (HELD, ""):
                found[term.phase] = found.get(term.phase, 0.0) + term.memory
        return found

    def peak(self, *parts: str) -> float:
        """Most bytes at once: what is held, and the largest moment."""
        return self.held(*parts) + max(self.phases(*parts).values(), default=0.0)

    def seconds(self, rates: Rates, *parts: str) -> float:
        """Time that CAPO adds to one optimizer step."""
        return sum(term.seconds(rates) for term in self._chosen(parts))

    def plain_seconds(self, rates: Rates) -> float:
        """Time of the update without CAPO."""
        return sum(term.seconds(rates) for term in self.plain)

    def _chosen(self, parts: tuple[str, ...]) -> list[Term]:
        return self.of(*parts) if parts else self.terms

    def document(self, rates: Rates) -> dict[str, Any]:
        """Everything, as plain data."""
        update, added = self.plain_seconds(rates), self.seconds(rates)
        parts = list(dict.fromkeys(term.part for term in self.terms))
        return {
            "symbols": self.symbols,
            "rates": asdict(rates),
            "held_bytes": self.held(),
            "peak_bytes": self.peak(),
            "plain_bytes": self.plain_memory,
            "phases": self.phases(),
            "seconds": added,
            "plain_seconds": update,
            "ratio": (added + update) / update,
            "parts": {
                part: {
                    "held_bytes": self.held(part),
                    "peak_bytes": self.peak(part),
                    "seconds": self.seconds(rates, part),
                }
                for part in parts
            },
            "terms": [asdict(term) | {"seconds": term.seconds(rates)} for term in self.terms],
            "plain_terms": [asdict(term) | {"seconds": term.seconds(rates)} for term in self.plain],
        }
