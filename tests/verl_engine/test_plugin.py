"""The plug-in is found, is taken, and says so in one sentence where it cannot be; and a killed process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from verl_engine.conftest import ENVIRONMENT, HERE, ROOT, python, read, succeeded, torchrun

LOOK_UP = """
import verl
from verl.workers.engine.base import EngineRegistry
print(EngineRegistry.get_engine_cls("language_model", "fsdp2").__name__)
"""
CONFIGURE = """
import sys
from pathlib import Path
from dataclasses import replace
from verl_engine.cases import CASES
from verl_engine import job
case = replace(CASES["thresholds"], capo=sys.argv[2] or None, overrides=tuple(sys.argv[3:]))
job.configs(case, Path(sys.argv[1]), 1)
"""
BUILD = (
    CONFIGURE
    + """
import os
os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0")
os.environ["DIST_INIT_METHOD"] = f"file://{sys.argv[1]}/rendezvous-{os.getpid()}"
from verl_engine.cpu_worker import CPUTrainingWorker
CPUTrainingWorker(job.configs(case, Path(sys.argv[1]), 1)[0]).reset()
"""
)
SELECTION = "{selection:{policy_shift:1e-4}}"
ACTOR = "actor_rollout_ref.actor"


def test_verl_finds_the_engine_by_the_entry_point_alone() -> None:
    found = python("-c", LOOK_UP, VERL_ENGINE_VENDOR="capo")
    succeeded(found)
    assert found.stdout.split() == ["CAPOEngine"]


def test_without_the_vendor_verl_takes_its_own() -> None:
    found = python("-c", LOOK_UP, VERL_ENGINE_VENDOR="")
    succeeded(found)
    assert found.stdout.split() == ["FSDPEngineWithLMHead"]


def refusal(script: str, folder: Path, *arguments: str, vendor: str = "capo") -> str:
    """The one line in which a run is refused."""
    process = python("-c", script, str(folder), *arguments, VERL_ENGINE_VENDOR=vendor)
    assert process.returncode != 0
    said = [line for line in process.stderr.splitlines() if "InputError" in line]
    lines = [line for line in said if "raise InputError" not in line]
    assert lines, process.stderr[-3000:]
    return lines[0]


@pytest.mark.parametrize("vendor", ["", "nvidia"])
def test_a_configuration_that_would_be_ignored_is_refused(folder: Path, vendor: str) -> None:
    line = refusal(CONFIGURE, folder, SELECTION, vendor=vendor)
    assert "VERL_ENGINE_VENDOR: must be 'capo' in the environment of every worker" in line


@pytest.mark.parametrize(
    ("capo", "field"),
    [
        ("{selektion:capo}", "fsdp_config.capo.selektion: is not known"),
        ("{selection:kapo}", "fsdp_config.capo.selection: must be one of"),
        ("{selection:{policy_shift:-1}}", "fsdp_config.capo.selection.policy_shift: must be"),
        ("{trust_region:{step_length:quadratic}}", "fsdp_config.capo.trust_region.step_length"),
        ("{monitor:true,trust_region:auto}", "fsdp_config.capo.monitor: only looks"),
        ("{monitor:{every:2}}", "fsdp_config.capo.monitor.every: is not known"),
        ("{monitor:{thresholds:kapo}}", "fsdp_config.capo.monitor.thresholds.selection: must be"),
    ],
)
def test_options_are_checked_where_verl_reads_them(folder: Path, capo: str, field: str) -> None:
    assert field in refusal(CONFIGURE, folder, capo)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ([f"{ACTOR}.strategy=fsdp"], f"{ACTOR}.strategy: must be fsdp2 for CAPO, got fsdp;"),
        (
            [f"{ACTOR}.fsdp_config.offload_policy=True"],
            f"{ACTOR}.fsdp_config.offload_policy: must be false for CAPO;",
        ),
        (
            [
                "actor_rollout_ref.model.use_fused_kernels=True",
                "actor_rollout_ref.model.fused_kernel_options.impl_backend=torch",
            ],
            "actor_rollout_ref.model.use_fused_kernels: must be false for CAPO:",
        ),
        (
            [
                "actor_rollout_ref.model.use_remove_padding=True",
                f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size=2",
            ],
            "ulysses_sequence_parallel_size: must be 1 for CAPO,",
        ),
    ],
)
def test_what_cannot_be_judged_is_refused(
    folder: Path, overrides: list[str], sentence: str
) -> None:
    assert sentence in refusal(BUILD, folder, SELECTION, *overrides)


def overrides_in(text: str) -> list[str]:
    """The lines that a diff adds to verl's command line."""
    added = re.findall(r"^\+    (\+?[\w.]+=\S+) \\$", text, flags=re.MULTILINE)
    return [line for line in added if "actor_rollout_ref" in line]


@pytest.mark.parametrize("page", ["README.md", "docs/verl.md"])
def test_what_the_documentation_adds_to_a_job_is_taken(folder: Path, page: str) -> None:
    added = overrides_in((ROOT / page).read_text())
    assert len(added) == 3
    script = CONFIGURE + (
        "\nconfig, _ = job.configs(case, Path(sys.argv[1]), 1)"
        "\nprint(type(config.engine_config).__name__, config.engine_config.options().region())"
    )
    process = python("-c", script, str(folder), "", *added, VERL_ENGINE_VENDOR="capo")
    succeeded(process)
    assert process.stdout.split("\n")[-2].startswith(
        "CAPOEngineConfig TrustRegion(policy_shift='auto'"
    )


def test_the_launch_file_is_a_configuration_of_verl(tmp_path: Path) -> None:
    """Hydra composes it, with verl's own schema, and prints it instead of running it."""
    environment = {**ENVIRONMENT, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    shown = subprocess.run(
        ["bash", str(ROOT / "examples" / "verl" / "run.sh"), "--cfg", "job"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    succeeded(shown)
    assert "_target_: capo.integrations.verl.CAPOEngineConfig" in shown.stdout
    assert re.search(r"capo:\n\s+trust_region: auto", shown.stdout)
    assert re.search(r"env_vars:\n\s+VERL_ENGINE_VENDOR: capo", shown.stdout)


@pytest.mark.parametrize("name", ["run.sh", "slurm.sbatch"])
def test_launch_files_are_bash(name: str) -> None:
    file = ROOT / "examples" / "verl" / name
    subprocess.run(["bash", "-n", str(file)], check=True)


def test_too_many_rows_are_refused(folder: Path) -> None:
    line = refusal(BUILD, folder, "{selection:capo,curvature_top_k:65}")
    assert "curvature_top_k: must be at most the vocabulary size 64" in line


def test_a_killed_process_ends_the_job_and_its_checkpoint_loads(folder: Path) -> None:
    killed = torchrun(2, folder, "killed")
    assert killed.returncode != 0
    assert "Signal 9 (SIGKILL)" in killed.stderr
    succeeded(torchrun(2, folder, "after-killed", "through"))
    resumed, through = read(folder, "after-killed", "2"), read(folder, "through", "2")
    assert [r["world"] for r in resumed] == [2, 2]
    for name, value in through[0]["weights"].items():
        assert value.equal(resumed[0]["weights"][name]), name


def test_a_killed_worker_ends_the_job_under_ray_too(folder: Path) -> None:
    def driven(*cases: str) -> subprocess.CompletedProcess[str]:
        return python(str(HERE / "ray_driver.py"), str(folder), *cases, VERL_ENGINE_VENDOR="capo")

    killed = driven("killed")
    assert killed.returncode != 0
    # Of the worker that died, or of the one that was left alone: which is told first is chance.
    assert re.search("ActorDiedError|Connection closed by peer", killed.stderr)
    succeeded(driven("after-killed", "through"))
    resumed, through = read(folder, "after-killed", "ray"), read(folder, "through", "ray")
    assert [r["world"] for r in resumed] == [2, 2]
    for name, value in through[0]["weights"].items():
        assert value.equal(resumed[0]["weights"][name]), name


def test_a_checkpoint_without_moments_is_refused(folder: Path) -> None:
    """One that verl's own engine wrote."""
    script = BUILD + (
        "\nworker = CPUTrainingWorker(job.configs(replace(case, capo=None), Path(sys.argv[1]), 1)[0])"
        "\nworker.reset(); worker.save_checkpoint(sys.argv[1] + '/stock-checkpoint')"
        "\nworker = CPUTrainingWorker(job.configs(case, Path(sys.argv[1]), 1)[0])"
        "\nworker.reset(); worker.load_checkpoint(sys.argv[1] + '/stock-checkpoint')"
    )
    line = refusal(script, folder, SELECTION)
    assert "stock-checkpoint holds no simulated moments (capo_state.safetensors)" in line


@pytest.mark.parametrize("kl_loss", [False, True])
def test_a_kl_loss_moves_every_completion(kl_loss: bool) -> None:
    """Whatever its advantage: the automatic budget counts it."""
    from types import SimpleNamespace

    import capo
    from capo.integrations._trl_trust import StepControl
    from capo.integrations._verl_actor import Actor

    region = capo.TrustRegion(sequences=4)
    control = StepControl(region, iterations=1, seed=0, shift_callbacks=[])
    config = SimpleNamespace(ppo_epochs=2, use_kl_loss=kl_loss, rollout_n=2)
    Actor._prepare_control(SimpleNamespace(region=region), control, config, 8)  # type: ignore[arg-type]
    assert (control.iterations, control.every_completion) == (2, kl_loss)
