"""What is to be tried, in order: a `Probe` each, or a `Finding` where the metadata settles it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points

from capo.doctor.finding import Finding
from capo.doctor.requirements import (
    LEADS,
    PROJECT,
    Needed,
    install_line,
    needed,
    version_of,
)

OPTIONAL = {  # what no extra asks for, and what it is good for
    "trackers": {name: f" (report_to={name!r})" for name in ("tensorboard", "wandb", "trackio")},
    "companions": {"peft": " (LoRA)"},
}
PATIENCE = 120.0  # seconds for one probe
LONG = 300.0  # for those that compile, or import a whole engine


@dataclass(frozen=True)
class Probe:
    """Something to be tried in a worker process.

    Attributes:
        section, name: as in a `Finding`.
        call: a function of `capo.doctor.probes`.
        arguments: of it.
        fix: what to do where it fails.
        needs: names of findings without which it is not tried.
        process: probes of one name share a process.
        environment: of that process, beside this one's.
        patience: seconds after which it counts as broken.
    """

    section: str
    name: str
    call: str
    arguments: tuple[str, ...] = ()
    fix: str = ""
    needs: tuple[str, ...] = ("torch",)
    process: str = "main"
    environment: tuple[tuple[str, str], ...] = ()
    patience: float = PATIENCE


def plan() -> list[Probe | Finding]:
    """Everything, in the report's order."""
    packages = needed()
    return [
        *_packages([each for each in packages if each.name == "torch"], "system"),
        Probe("system", "device", "device"),
        *_packages([each for each in packages if each.name != "torch"], "packages"),
        *_backends(),
        *_engines(),
        *_rest(),
    ]


def _packages(packages: list[Needed], section: str) -> Iterator[Probe | Finding]:
    if not packages:
        if section == "system":
            yield Probe(section, "torch", "package", ("torch", "torch"), "pip install torch", ())
            return
        what = f"{PROJECT} is imported from a folder, not installed: verl finds no plug-in then"
        fix = f"pip install {PROJECT} (or pip install --editable . in a checkout)"
        yield Finding(section, PROJECT, "broken", what, fix)
    for each in packages:
        asks = f" ({', '.join(each.askers)})" if each.askers else ""
        if each.unmet is not None:
            yield Finding(section, each.name, "broken", _unmet(each), each.fix)
        elif each.version is not None:
            fix = f"pip install --force-reinstall '{each.name}=={each.version.partition('+')[0]}'"
            needs = () if each.name == "torch" else ("torch",)
            call = (each.name, each.module, asks)
            yield Probe(section, each.name, "package", call, fix, needs)
        elif each.name in LEADS.values():  # one line for an extra, not one for each of its packages
            yield Finding(section, each.name, "absent", "not installed", each.fix)


def _unmet(each: Needed) -> str:
    wanted = each.unmet
    assert wanted is not None
    asker = PROJECT + (f"[{each.askers[0]}]" if each.askers else "")
    if each.version is None:
        return f"missing, but {asker} needs it"
    return f"{each.version}, but {asker} needs {wanted.specifier}"


def _backends() -> Iterator[Probe | Finding]:
    section = "statistics"
    for name in ("eager", "chunked"):
        yield Probe(section, name, "backend", (name,), "report it: this is capo's own code")
    compiler = (
        "apt install g++ (or another C++ compiler named by CXX); until then it goes on unfused"
    )
    yield Probe(section, "compiled loop", "compiled", fix=compiler, patience=LONG)
    if version_of("triton") is None:
        yield Finding(section, "triton kernels", "absent", "not installed", install_line("triton"))
        return
    yield Probe(
        section,
        "triton kernels",
        "triton",
        fix="pip install --force-reinstall 'capo-rl[triton]'; until then impl='chunked'",
        needs=("torch", "triton"),
        process="triton",  # where no GPU is, its interpreter must be asked for before its first import
        patience=LONG,
    )


def _engines() -> Iterator[Probe | Finding]:
    section = "engines"
    trl = Probe(
        section, "TRL", "trl_step", fix=install_line("trl"), needs=("torch", "trl", "transformers")
    )
    yield from _where("trl", trl)
    if version_of("deepspeed") is not None:
        fix = "DS_BUILD_OPS=0 pip install --force-reinstall 'capo-rl[trl,deepspeed]'"
        yield Probe(section, "DeepSpeed", "deepspeed", fix=fix, needs=("torch", "deepspeed"))
    else:
        yield Finding(section, "DeepSpeed", "absent", "not installed", install_line("deepspeed"))
    if version_of("verl") is None:
        yield Finding(section, "verl", "absent", "not installed", install_line("verl"))
    elif not any(e.name == "capo" for e in entry_points(group="verl.plugins")):
        what = (
            "the entry point verl.plugins → capo is not registered: verl would train without CAPO"
        )
        yield Finding(section, "verl", "broken", what, f"pip install --force-reinstall {PROJECT}")
    else:
        yield Probe(
            section,
            "verl",
            "verl_plugin",
            (os.environ.get("VERL_ENGINE_VENDOR", ""),),
            fix="pip install 'capo-rl[verl]' in an environment without trl",
            needs=("torch", "verl"),
            process="verl",
            environment=(("VERL_ENGINE_VENDOR", "capo"),),
            patience=LONG,
        )
    yield Probe(section, "several processes", "processes")


def _rest() -> Iterator[Probe | Finding]:
    policy = Probe(
        "policy",
        "embedded:sums",
        "policy",
        fix=install_line("trl"),
        needs=("torch", "transformers"),
    )
    yield (
        policy
        if version_of("transformers")
        else Finding("policy", policy.name, "absent", "needs transformers", install_line("trl"))
    )
    yield from _where(
        "lab", Probe("lab", "figures", "figure", fix=install_line("lab"), needs=("altair",))
    )
    grading = Probe("lab", "grading", "grading", fix=install_line("tasks"), needs=("math-verify",))
    yield (
        grading
        if version_of("math-verify")
        else Finding("lab", "grading", "absent", "needs math-verify", install_line("tasks"))
    )
    for section, names in OPTIONAL.items():
        for name, use in names.items():
            install = f"pip install {name}"
            if version_of(name) is None:
                yield Finding(section, name, "absent", f"not installed{use}", install)
            else:
                yield Probe(section, name, "package", (name, name, use), f"{install} --upgrade")


def _where(extra: str, probe: Probe) -> Iterator[Probe | Finding]:
    if version_of(LEADS[extra]) is not None:
        yield probe
    else:
        yield Finding(probe.section, probe.name, "absent", "not installed", install_line(extra))
