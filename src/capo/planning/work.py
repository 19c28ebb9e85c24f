"""The work and the memory of one thing that is done, and how long the work takes on a device."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

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
        memory: bytes that it has; None where that is not known.
    """

    name: str
    flops: float
    wide_flops: float
    bandwidth: float
    link: float
    memory: float | None = None

    def __post_init__(self) -> None:
        """Check every rate."""
        for name in ("flops", "wide_flops", "bandwidth", "link", "memory"):
            value = getattr(self, name)
            if name == "memory" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise InputError("--device", f"{name} must be a number > 0, got {value!r}.")


class _Sheet(NamedTuple):
    """A data sheet: dense bf16 products, TF32 × 1/3 for the three products of one in float32, memory's
    bytes a second, NVLink one way, a node's eight network adapters together, memory."""

    flops: float
    wide_flops: float
    bandwidth: float
    link: float
    network: float
    memory: float


# Times what training jobs attain: 0.4 of the products, 0.7 of memory and links. Adapters of 200 Gbit/s
# beside an A100 and of 400 Gbit/s beside the others, one a device.
_SHEETS = {
    "a100": _Sheet(312e12, 156e12 / 3, 2.0e12, 300e9, 8 * 25e9, 80e9),
    "h100": _Sheet(989e12, 495e12 / 3, 3.35e12, 450e9, 8 * 50e9, 80e9),
    "h200": _Sheet(989e12, 495e12 / 3, 4.8e12, 450e9, 8 * 50e9, 141e9),
    "b200": _Sheet(2250e12, 1100e12 / 3, 8.0e12, 900e9, 8 * 50e9, 180e9),
}
ATTAINED_FLOPS, ATTAINED_BYTES = 0.4, 0.7
NODE = 8
"""Devices of a node."""


def device_rates(name: str, gpus: int = 1) -> Rates:
    """The rates of a device by name, or those of a JSON file that `capo bench plan` wrote.

    Args:
        name: of the device, or of the file.
        gpus: devices of the job. Of more than one node every byte that a ring sends crosses each node's
            adapters once, so that a device cannot send faster than they do together.

    Raises:
        InputError: neither such a device nor such a file is known.
    """
    if name in _SHEETS:
        sheet = _SHEETS[name]
        link = sheet.link if gpus <= NODE else min(sheet.link, sheet.network)
        return Rates(
            name,
            sheet.flops * ATTAINED_FLOPS,
            sheet.wide_flops * ATTAINED_FLOPS,
            sheet.bandwidth * ATTAINED_BYTES,
            link * ATTAINED_BYTES,
            sheet.memory,
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
