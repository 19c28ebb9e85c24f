"""`capo plan`: what it prints and what it refuses."""

from __future__ import annotations

import json
import subprocess

import pytest

from planning.test_architecture import LARGE
from run_kit import capo_command, here


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LARGE["7 B"][2]))
    return path


def capo(*arguments):
    return here("plan", *map(str, arguments))


def test_every_term_is_printed_and_adds_up(config):
    command = capo_command("plan", "--model", str(config), "--gpus", "8")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in ("selection", "trust region", "simulated moments", "2·4·V·d", "V = 152,064"):
        assert word in done.stdout
    assert "\x1b" not in done.stdout
    said = json.loads(capo("--model", config, "--gpus", 8, "--json").stdout)
    assert said["held_bytes"] == sum(t["memory"] for t in said["terms"] if t["phase"] == "held")
    assert said["seconds"] == pytest.approx(sum(t["seconds"] for t in said["terms"]))
    assert said["model"]["parameters"] == 7_615_616_512


def test_the_monitor_has_terms_of_its_own(config):
    said = json.loads(
        capo("--model", config, "--monitor", "--no-selection", "--no-trust-region", "--json").stdout
    )
    assert {term["part"] for term in said["terms"]} == {"monitor"}


def test_bad_input_is_one_sentence(config):
    for arguments in (("--gpus", 7), ("--sharding", "tp"), ("--device", "abacus")):
        done = capo("--model", config, *arguments)
        assert done.returncode == 2
        assert done.stdout == ""
        assert len(done.stderr.strip().splitlines()) == 1
        assert done.stderr.startswith("capo: --")
