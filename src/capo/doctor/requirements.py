"""What `capo-rl` asks for, and what of it is installed, from the package metadata alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = "capo-rl"
# The package that makes an extra "installed": the others of an extra may be there for other reasons.
LEADS = {
    "trl": "trl",
    "deepspeed": "deepspeed",
    "verl": "verl",
    "triton": "triton",
    "lab": "altair",
    "tasks": "reasoning-gym",
}
INSTALL = {"deepspeed": "pip install 'capo-rl[trl,deepspeed]'"} | {
    extra: f"pip install 'capo-rl[{extra}]'" for extra in LEADS if extra != "deepspeed"
}
OWN_ENVIRONMENT = " (in an environment of its own: verl and TRL want different transformers)"
_MODULES = {"vl-convert-python": "vl_convert"}


@dataclass
class Needed:
    """A distribution that something of ours asks for.

    Attributes:
        name: canonical.
        version: what is installed, None where nothing is.
        extras: who asks; ``""`` is the package itself.
        wanted: every requirement that counts here: the package's own and those of installed extras.
    """

    name: str
    version: str | None
    extras: list[str] = field(default_factory=list)
    wanted: list[Requirement] = field(default_factory=list)

    @property
    def module(self) -> str:
        """Its importable name."""
        return _MODULES.get(self.name, self.name.replace("-", "_"))

    @property
    def askers(self) -> list[str]:
        """The extras that ask for it and are installed; none for what the package itself needs."""
        return [e for e in self.extras if e and version_of(LEADS[e]) is not None]

    @property
    def unmet(self) -> Requirement | None:
        """The first requirement that counts and is not met."""
        for each in self.wanted:
            if self.version is None or not each.specifier.contains(self.version, prereleases=True):
                return each
        return None

    @property
    def fix(self) -> str:
        """What makes it right."""
        if self.version is None and "" not in self.extras:
            return install_line(self.extras[0])
        ranges = sorted({str(each.specifier) for each in self.wanted})
        return f"pip install '{self.name}{','.join(ranges)}'"


def version_of(name: str) -> str | None:
    """What is installed of a distribution; None where nothing is."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def install_line(extra: str) -> str:
    """The command that installs an extra."""
    return INSTALL[extra] + (OWN_ENVIRONMENT if extra == "verl" else "")


def needed() -> list[Needed]:
    """Everything that this package and its extras (but those of its developers) ask for.

    Empty where the package itself is not installed.
    """
    try:
        lines = metadata.requires(PROJECT) or []
    except metadata.PackageNotFoundError:
        return []
    found: dict[str, Needed] = {}
    for requirement in map(Requirement, lines):
        for extra in ("", *LEADS):
            if not _asked_by(requirement, extra):
                continue
            name = canonicalize_name(requirement.name)
            entry = found.setdefault(name, Needed(name, version_of(name)))
            if entry.extras != [""]:
                entry.extras.append(extra)
            if not extra or version_of(LEADS[extra]) is not None:
                entry.wanted.append(requirement)
            if not extra:
                break
    order = ["", *LEADS]
    return sorted(found.values(), key=lambda each: order.index(each.extras[0]))


def _asked_by(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    if marker is None:
        return not extra
    if not extra:
        return "extra" not in str(marker) and marker.evaluate()
    return "extra" in str(marker) and marker.evaluate({"extra": extra})
