"""``capo doctor``: what works is found to work, and every planted fault is found and named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.console import Console
from typer.testing import CliRunner

from capo.cli.main import app
from capo.core.statistics import chunked
from capo.doctor import Finding, examine, probes
from capo.doctor import plan as planning
from capo.doctor.plan import Probe, plan
from capo.doctor.requirements import needed
from capo.doctor.show import Printer, summary

ROOT = Path(__file__).parents[2]


def only(*names: str) -> list[Probe | Finding]:
    """The part of the plan that has these names."""
    return [each for each in plan() if each.name in names]


def found(*names: str) -> dict[str, Finding]:
    return {each.name: each for each in examine(wanted=only(*names))}


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that every process finds its modules in first."""
    folder = tmp_path / "planted"
    folder.mkdir()
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT / "src"), before]))
    return folder


def plant_module(folder: Path, name: str, code: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)


def plant_version(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_the_plan_covers_every_extra_of_a_user() -> None:
    extras = {extra for each in needed() for extra in each.extras}
    assert extras == {"", "trl", "deepspeed", "verl", "triton", "lab", "tasks"}
    names = [each.name for each in plan()]
    assert len(names) == len({(each.section, each.name) for each in plan()})
    assert names[0] == "torch"
    for name in ("eager", "chunked", "compiled loop", "TRL", "verl", "embedded:sums", "wandb"):
        assert name in names


def test_what_works_is_measured() -> None:
    results = found("torch", "device", "eager", "chunked")
    assert [each.state for each in results.values()] == ["ok"] * 4
    assert "against float64" in results["eager"].found
    assert not any(each.fix for each in results.values())


def test_wrong_numbers_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = chunked.compute

    def wrong(problem: Any) -> Any:
        statistics = right(problem)
        return replace(statistics, u_sampled=statistics.u_sampled * 1.01)

    monkeypatch.setattr(chunked, "compute", wrong)
    assert "against float64" in probes.backend("eager")
    with pytest.raises(RuntimeError, match=r"relative error .* against float64, more than"):
        probes.backend("chunked")


def test_a_broken_import_is_named_and_what_needs_it_is_not_tried(planted: Path) -> None:
    pytest.importorskip("triton")
    plant_module(planted, "triton", "raise ImportError('planted: libtriton.so is not there')")
    results = found("torch", "triton", "triton kernels")
    assert results["triton"].state == "broken"
    assert results["triton"].found == "ImportError: planted: libtriton.so is not there"
    assert results["triton"].fix.startswith("pip install --force-reinstall 'triton==")
    assert results["triton kernels"] == Finding(
        "statistics", "triton kernels", "untried", "not tried without triton"
    )


def test_without_torch_nothing_else_is_tried(planted: Path) -> None:
    plant_module(planted, "torch", "raise OSError('libtorch_cpu.so: cannot open shared object')")
    results = list(examine())
    states = {each.name: each.state for each in results if each.section not in ("lab", "trackers")}
    assert states.pop("torch") == "broken"
    assert set(states.values()) <= {"untried", "absent"}


def test_a_process_that_dies_or_hangs_ends_nothing(planted: Path) -> None:
    plant_module(planted, "dies", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    plant_module(planted, "leaves", "raise SystemExit(3)")
    plant_module(planted, "hangs", "import time; time.sleep(600)")
    plant_module(planted, "chatters", "import os; os.write(1, b'no JSON\\n'); raise KeyError('x')")
    wanted: list[Probe | Finding] = [
        Probe("x", name, "package", (name, name), "do it", (), patience=60)
        for name in ("dies", "leaves", "chatters")
    ]
    wanted += [Probe("x", "hangs", "package", ("hangs", "hangs"), needs=(), patience=3)]
    wanted += [Probe("x", "json", "package", ("rich", "json"), needs=())]
    results = [(each.state, each.found) for each in examine(wanted=wanted)]
    assert results[:4] == [
        ("broken", "its process died (SIGSEGV)"),
        ("broken", "SystemExit: 3"),
        ("broken", "KeyError: 'x'"),
        ("broken", "no answer within 3 s"),
    ]
    assert results[4][0] == "ok"


def test_an_incompatible_version_is_named(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    plant_version(planted, "trl", "0.9.6")
    monkeypatch.syspath_prepend(str(planted))
    results = found("torch", "trl", "TRL")
    assert results["trl"].state == "broken"
    assert results["trl"].found == "0.9.6, but capo-rl[trl] needs <2,>=1.16"
    assert results["trl"].fix == "pip install 'trl<2,>=1.16'"
    assert results["TRL"].state == "untried"


def test_a_version_that_only_an_absent_extra_forbids_is_no_fault(
    planted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if any(each.name == "verl" and each.version for each in needed()):
        pytest.skip("verl is installed")
    plant_version(planted, "fastapi", "0.1")
    monkeypatch.syspath_prepend(str(planted))
    assert all(not isinstance(each, Finding) or each.state != "broken" for each in plan())
    plant_version(planted, "verl", "0.9.1")  # now verl's extra is installed, and lacks uvicorn
    fault = next(each for each in plan() if each.name == "uvicorn")
    assert isinstance(fault, Finding)
    assert (fault.state, fault.found) == ("broken", "missing, but capo-rl[verl] needs it")


def test_verl_without_our_entry_point_is_broken(
    planted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_version(planted, "verl", "0.9.1")
    monkeypatch.syspath_prepend(str(planted))
    monkeypatch.setattr(planning, "entry_points", lambda group: ())
    fault = next(each for each in plan() if each.section == "engines" and each.name == "verl")
    assert isinstance(fault, Finding)
    assert fault.state == "broken"
    assert "verl.plugins" in fault.found


def test_a_compiler_that_is_absent_and_one_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("CXX", "no-such-compiler")
    absent = found("torch", "compiled loop")["compiled loop"]
    assert (absent.state, absent.found) == (
        "absent",
        "no C++ compiler (no-such-compiler is not found)",
    )
    assert "apt install g++" in absent.fix
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    broken = found("torch", "compiled loop")["compiled loop"]
    assert broken.state == "broken"
    assert broken.found.startswith("RuntimeError: torch.compile failed")


def test_exit_codes_and_json(monkeypatch: pytest.MonkeyPatch) -> None:
    good = Finding("packages", "torch", "ok", "2.13")
    gone = Finding("packages", "verl", "absent", "not installed", "pip install 'capo-rl[verl]'")
    bad = Finding("packages", "triton", "broken", "ImportError: planted", "pip install triton")
    for findings, code in (([good, gone], 0), ([good, gone, bad], 1)):
        monkeypatch.setattr("capo.doctor.examine", lambda *_, given=findings: iter(given))
        result = CliRunner().invoke(app, ["doctor", "--json"])
        assert result.exit_code == code
        document = json.loads(result.stdout)
        assert document["broken"] == [each.name for each in findings if each.state == "broken"]
        assert document["findings"] == [each.as_dict() for each in findings]
        result = CliRunner().invoke(app, ["doctor"])
        assert result.exit_code == code
        assert result.stdout.splitlines()[-1] == summary(findings)
    assert "BROKEN   triton" in result.stdout
    assert "→ pip install triton" in result.stdout


def test_the_text_does_not_depend_on_colour(capsys: pytest.CaptureFixture[str]) -> None:
    printer = Printer(Console(width=60))
    printer.finding(Finding("packages", "a[b]", "broken", "x" * 70, "pip install 'a[b]'"))
    lines = capsys.readouterr().out.splitlines()
    assert "  BROKEN   a[b]                  " + "x" * 70 in lines  # piped: one line
    assert "           → pip install 'a[b]'" in lines


def closure(names: list[str]) -> set[str]:
    """A distribution's requirements, theirs, and so on."""
    seen: set[str] = set()
    while names:
        name = canonicalize_name(names.pop())
        if name in seen:
            continue
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        seen.add(name)
        for requirement in map(Requirement, lines):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                names.append(requirement.name)
    return seen


@pytest.mark.slow
def test_a_bare_installation_is_well_and_says_what_could_be_added(tmp_path: Path) -> None:
    """A real environment with what `pip install capo-rl` brings, and no extra."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    site = next((tmp_path / "bare" / "lib").glob("python*/site-packages"))
    for name in closure(["capo-rl", "packaging"]):
        distribution = metadata.distribution(name)
        for top in {Path(str(file)).parts[0] for file in distribution.files or []}:
            source = Path(str(distribution.locate_file(top)))
            if top not in ("..", "__pycache__") and not (site / top).exists() and source.exists():
                (site / top).symlink_to(source)
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(
        [tmp_path / "bare" / "bin" / "python", "-m", "capo.cli.main", "doctor", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr + process.stdout
    states = {
        (each["section"], each["name"]): each for each in json.loads(process.stdout)["findings"]
    }
    assert states["packages", "trl"]["state"] == "absent"
    assert states["packages", "trl"]["fix"] == "pip install 'capo-rl[trl]'"
    assert states["engines", "TRL"]["fix"] == "pip install 'capo-rl[trl]'"
    assert states["statistics", "eager"]["state"] == "ok"
    assert states["policy", "embedded:sums"]["state"] == "absent"


@pytest.mark.slow
def test_everything_that_is_installed_here_works() -> None:
    results = list(examine())
    assert [each for each in results if each.state in ("broken", "untried")] == []
    tried = {each.name: each for each in results}
    if tried["trl"].state == "ok":
        assert "one step on" in tried["TRL"].found
    if tried["triton"].state == "ok":
        assert "against float64" in tried["triton kernels"].found
