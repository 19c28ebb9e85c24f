"""The launch files of examples/: they parse, accelerate takes them, and the one for CPUs trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
CONFIGS = sorted((EXAMPLES / "trl").glob("*.yaml"))
SCRIPTS = [*sorted(EXAMPLES.rglob("*.sh")), *sorted(EXAMPLES.rglob("*.sbatch"))]


def name(path):
    return str(path.relative_to(EXAMPLES))


def test_there_are_files_for_every_engine():
    assert {path.stem for path in CONFIGS} == {"ddp", "fsdp2", "zero3"}
    assert {"trl/run.sh", "trl/slurm.sbatch", "verl/run.sh", "verl/slurm.sbatch"} <= {
        name(path) for path in SCRIPTS
    }


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_scripts_are_bash(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert script.read_text().startswith("#!/usr/bin/env bash\n")


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_accelerate_takes_the_configuration(path):
    """As `accelerate launch` reads it: every key is known, and the engine is the one that is named."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    document = yaml.safe_load(path.read_text())
    config = load_config_from_file(str(path))
    assert config.to_dict()["distributed_type"] == document["distributed_type"]
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    settled, _, _ = _validate_launch_command(arguments)
    assert settled.num_processes == document["num_processes"]
    assert settled.use_fsdp == (path.stem == "fsdp2")
    assert settled.use_deepspeed == (path.stem == "zero3")
    if settled.use_fsdp:
        assert int(settled.fsdp_version) == 2
    if settled.use_deepspeed:
        inner = json.loads((ROOT / settled.deepspeed_config_file).read_text())
        assert inner["zero_optimization"]["stage"] == 3
        assert inner["zero_force_ds_cpu_optimizer"] is False


def test_slurm_hands_every_node_its_rank(tmp_path):
    """With stand-ins for Slurm's own commands: what `accelerate` is called with on the second node."""
    stand_in(tmp_path, "scontrol", 'printf "node1\\nnode2\\n"')
    stand_in(tmp_path, "srun", 'shift; SLURM_NODEID=1 exec "$@"')
    stand_in(tmp_path, "accelerate", 'printf "%s\\n" "$@"')
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_GPUS_PER_NODE": "h100:4",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    done = subprocess.run(
        ["bash", EXAMPLES / "trl" / "slurm.sbatch", "zero3", "--max_steps", "3"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    words = done.stdout.split()
    for pair in (
        ("--config_file", "examples/trl/zero3.yaml"),
        ("--num_machines", "2"),
        ("--num_processes", "8"),
        ("--machine_rank", "1"),
        ("--main_process_ip", "node1"),
        ("--max_steps", "3"),
    ):
        assert words[words.index(pair[0]) + 1] == pair[1]


def stand_in(folder, program, body):
    path = folder / program
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def test_an_unknown_engine_is_one_sentence():
    done = subprocess.run(
        [EXAMPLES / "trl" / "run.sh", "megatron"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "run.sh: the engine must be ddp, fsdp2 or zero3, got 'megatron'\n"


@pytest.mark.slow
@pytest.mark.engine
def test_two_processes_train(tmp_path):
    """The whole way: run.sh, accelerate, two processes, a trained policy."""
    from capo.policies.loading import EMBEDDED

    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{a}+{b}=", "solution": f"${a + b}$"} for a in range(8) for b in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "output_dir": tmp_path / "run",
        "max_steps": 1,
        "num_generations": 2,
        "gradient_accumulation_steps": 1,
        "max_completion_length": 8,
        "num_iterations": 1,
        "save_steps": 1,
        "logging_steps": 1,
        "bf16": "false",
        "use_cpu": "true",
    }
    done = subprocess.run(
        [
            EXAMPLES / "trl" / "run.sh",
            "ddp",
            *(str(word) for key, value in options.items() for word in (f"--{key}", value)),
        ],
        env={
            **os.environ,
            "MODEL": str(EMBEDDED["embedded:sums"]),
            "DATA": str(data),
            "LAUNCH": "--num_processes 2 --mixed_precision no",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "model.safetensors").is_file()
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert "capo/trust/measured_policy_shift" in state["log_history"][0]
    assert state["log_history"][0]["num_tokens"] > 0
    # Two processes: each saves the state of its random numbers.
    saved = tmp_path / "run" / "checkpoint-1"
    assert {path.name for path in saved.glob("rng_state_*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }
