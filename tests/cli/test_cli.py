"""The command line: what it prints, what it refuses, and what it leaves behind."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_kit import asked, asks

import capo
from capo.cli.main import main
from capo.cli.make import BENCHES
from capo.lab.rundir import RunDirectory
from capo.lab.sources import preset_names
from capo.policies.loading import EMBEDDED
from run_kit import TINY, start, tiny, wait_for_lines, weights


def test_help_and_version_import_nothing_heavy():
    code = (
        "import sys; sys.argv = ['capo', '--help']\n"
        "from capo.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'trl', 'pandas', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_version(run_capo):
    assert run_capo("--version") == (0, f"capo {capo.__version__}\n", "")


def test_presets_are_listed_and_shown(run_capo):
    code, out, _ = run_capo("presets")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == preset_names()
    code, out, _ = run_capo("presets", "show", "paper-aggressive")
    assert code == 0
    assert "learning_rate = 1.5e-5" in out


@pytest.fixture
def foreign_tokenizer(tmp_path):
    """A policy whose tokenizer knows more tokens than the model embeds."""
    directory = tmp_path / "foreign"
    shutil.copytree(EMBEDDED["embedded:sums"], directory)
    document = json.loads((directory / "tokenizer.json").read_text())
    document["model"]["vocab"]["Ω"] = 1000
    (directory / "tokenizer.json").write_text(json.dumps(document))
    return directory


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["small-agressive"], "config"),
        (["nowhere.toml"], "config"),
        (["small-aggressive", "training.learning_rat=1"], "training.learning_rat"),
        (["small-aggressive", "training.learning_rate=fast"], "training.learning_rate"),
        (["small-aggressive", "training.steps=0"], "training.steps"),
        (["small-aggressive", "training.completions_per_step=90"], "training.completions_per_step"),
        (["small-aggressive", "capo.selection={policy_shift=-1.0}"], "capo.selection.policy_shift"),
        (
            ["small-aggressive", "capo.selection={objective_shift=[1.0, 0.0]}"],
            "capo.selection.objective_shift",
        ),
        (["small-aggressive-capo", "capo.top_k=65"], "capo.top_k"),
        (["small-aggressive", "training.top_k=65"], "training.top_k"),
        (["small-aggressive", "policy.path=nowhere"], "policy.path"),
        (["small-aggressive", "policy.path=embedded:nothing"], "policy.path"),
        (["small-aggressive", "task.name=chess"], "task.name"),
        (["small-aggressive", "task.params.smallest=-1"], "task.params.smallest"),
        (["small-aggressive", "task.params.colour=1"], "task.params.colour"),
        (["small-aggressive", "eval.problems=1000000"], "eval.problems"),
        (["small-aggressive", "training.max_prompt_tokens=2"], "training.max_prompt_tokens"),
        (["small-aggressive", "steps=3"], "steps=3"),
        (["small-aggressive", "--resume"], "output"),
        (["small-aggressive", "--resume", "--overwrite"], "--resume"),
        (["--resume"], "output"),
        ([], "CONFIG"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_sentence_and_writes_nothing(run_capo, tmp_path, arguments, field):
    output = tmp_path / "run"
    code, out, err = run_capo("train", *arguments, "--output", output)
    assert (code, out) == (2, "")
    assert err.startswith(f"capo: {field}: ")
    assert err.count("\n") == 1
    assert not output.exists()


def test_a_foreign_tokenizer_is_refused(run_capo, tmp_path, foreign_tokenizer):
    output = tmp_path / "run"
    path = f"policy.path={foreign_tokenizer}"
    code, _, err = run_capo("train", "small-aggressive", path, "--output", output)
    assert code == 2
    assert "policy.path: the tokenizer" in err
    assert "does not match the model" in err
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["presets", "show", "huge"], "preset: 'huge' is not one of"),
        (["presets", "show"], "NAME: must be one of"),
        (["compare", "nowhere"], "runs: nowhere is not a directory"),
        (["report", "nowhere"], "runs: nowhere is not a directory"),
        (["eval", "nowhere"], "policy.path: 'nowhere' is not a directory"),
        (["eval", "embedded:sums", "--task", "chess"], "task.name: must be one of"),
        (["eval", "embedded:sums", "--problems", "1000000"], "--problems: must be in"),
        (["eval", "embedded:sums", "--device", "meta"], "--device: 'meta' is not there"),
        (["eval", "embedded:sums", "--suite", "embedded", "--dtype", "int8"], "--dtype: must be"),
        (["bench", "speed"], "bench: must be one of step, core"),
        *(
            (["bench", bench, option, number], f"{option}: must be at least 1, got {number}.")
            for bench in ("warning", "fidelity")
            for option, number in (("--seeds", "0"), ("--jobs", "-1"), ("--jobs", "0"))
        ),
        (
            ["bench", "warning", "--report-only", "--output", "gone"],
            "--output: 'gone/judged.json' records no run",
        ),
        (["pretrain", "-o", "OUT", "--set", "steps=-1"], "steps: "),
        (["pretrain", "-o", "OUT", "--config", "nowhere.toml"], "config: "),
        (
            ["pretrain", "-o", "OUT", "--config", "aiw", "--set", "path=1"],
            "path: is not a known key",
        ),
        (["demo", "-o", "{file}"], "output: "),
        (["inspect", "RUN", "--serve", "-o", "page.html"], "--output: is for the file"),
        (["inspect", "RUN", "--serve", "--limit-mb", "10"], "--limit-mb: is for the file"),
        (["inspect", "RUN", "--port", "0"], "--port: is where to --serve"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_other_commands_refuse_too(run_capo, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    code, out, err = run_capo(*(argument.format(file="file") for argument in arguments))
    assert (code, out) == (2, "")
    assert err.startswith(f"capo: {says}")
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ModuleNotFoundError("x", name="trl"), "trl is missing; pip install 'capo-rl[trl]'"),
        (ModuleNotFoundError("x", name="transformers.models"), "pip install 'capo-rl[trl]'"),
        (ModuleNotFoundError("x", name="altair"), "pip install 'capo-rl[lab]'"),
        (ModuleNotFoundError("x", name="reasoning_gym"), "pip install 'capo-rl[tasks]'"),
        (ModuleNotFoundError("x", name="vl_convert"), "pip install 'capo-rl[lab]'"),
        (ModuleNotFoundError("x", name="peft"), "peft is missing; pip install peft"),
        (
            ImportError("undefined symbol: z", name="torch"),
            "undefined symbol: z; `capo doctor` says",
        ),
    ],
    ids=str,
)
def test_a_missing_package_is_named_with_its_remedy(run_capo, monkeypatch, error, says):
    def fail(*_):
        raise error

    monkeypatch.setattr("capo.lab.sources.preset_names", fail)
    code, out, err = run_capo("presets")
    assert (code, out) == (2, "")
    assert err.startswith("capo: ")
    assert says in err
    assert err.count("\n") == 1


def test_a_fault_of_our_own_is_not_called_a_missing_package(monkeypatch):
    def fail(*_):
        raise ModuleNotFoundError("x", name="capo.absent")

    monkeypatch.setattr("capo.lab.sources.preset_names", fail)
    monkeypatch.setattr(sys, "argv", ["capo", "presets"])
    with pytest.raises(ModuleNotFoundError):
        main()


def test_help_of_bench_lists_the_benches(run_capo, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = run_capo("bench", "--help")
    assert (code, err) == (0, "")
    assert "What to measure." in out
    assert all(f"{name})" in out or f"{name}," in out for name in BENCHES)
    assert "capo bench step --help" in out


@pytest.mark.parametrize(
    ("command", "default"),
    [
        (["eval"], "[default: 512]"),
        (["train"], "[default: runs/CONFIG]"),
        (["inspect"], "[default: RUN/inspect.html]"),
        (["pretrain"], "[default: the shipped policy's recipe]"),
        (["lab", "sweep"], "[default: one a core]"),
    ],
    ids=str,
)
def test_help_says_what_is_left_out(run_capo, monkeypatch, command, default):
    monkeypatch.setenv("COLUMNS", "200")
    assert default in run_capo(*command, "--help")[1]


@pytest.mark.parametrize("bench", BENCHES)
def test_every_bench_shows_its_own_help(run_capo, bench):
    code, out, err = run_capo("bench", bench, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: capo bench {bench} ")
    own = set(re.findall(r"^  (--[a-z-]+)", out, re.MULTILINE))
    assert len(own) > 2


def test_settings_that_are_given_twice_add_up(run_capo, monkeypatch, tmp_path):
    monkeypatch.setattr("capo.policies.pretrain.pretrain", asks)
    twice = ("--set", "task.params.smallest=20", "--set", "task.params.largest=50")
    recipe = asked(run_capo, "pretrain", "-o", tmp_path, *twice)[0]
    assert recipe.task.params == {"smallest": 20, "largest": 50}
    word = ("--config", "spell_backward", "--set", "task.params.max_word_len=5")
    recipe = asked(run_capo, "pretrain", "-o", tmp_path, *word)[0]
    assert (recipe.task.name, recipe.task.params["min_word_len"]) == ("reasoning_gym", 3)
    assert recipe.task.params["max_word_len"] == 5

    monkeypatch.setattr("capo.lab.ingredients.load_configured_task", asks)
    twice = ("--param", "parameters.a=1", "--param", "parameters.b=2", "--param", "size=3")
    name, params = asked(run_capo, "eval", "embedded:sums", *twice)
    assert (name, params) == ("sums", {"parameters": {"a": 1, "b": 2}, "size": 3})


@pytest.mark.slow
def test_train_eval_compare_and_report(run_capo, tmp_path):
    grpo, judged = tmp_path / "grpo", tmp_path / "capo"
    code, out, err = run_capo("train", "small-aggressive", *TINY, "--output", grpo)
    assert code == 0
    assert str(grpo / "final") in out
    assert "step 0/4, accuracy" in err
    code, out, err = run_capo("train", "small-aggressive-capo", *TINY, "-o", judged, "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    evals = RunDirectory(judged).rows("evals.jsonl")
    assert facts["accuracy"] == evals[-1]["accuracy"]

    code, out, _ = run_capo("eval", grpo, "--problems", 16, "--k", 2, "--json")
    assert code == 0
    measured = json.loads(out)
    assert measured["problems"] == 16
    assert 0 <= measured["accuracy"] <= measured["pass_at_k"] <= 1

    model = ("eval", grpo / "final", "--problems", 16, "--k", 2, "--json")  # a model's directory
    code, out, _ = run_capo(*model)
    assert (code, json.loads(out)["accuracy"]) == (0, measured["accuracy"])

    code, out, _ = run_capo("compare", grpo, judged)
    assert code == 0
    assert "CAPO" in out
    code, out, _ = run_capo("compare", grpo, judged, "--json")
    assert [row["algorithm"] for row in json.loads(out)] == ["GRPO", "CAPO"]

    report = tmp_path / "report.html"
    code, out, _ = run_capo("report", grpo, judged, "--output", report)
    assert (code, out) == (0, f"{report}\n")
    assert report.read_text().startswith("<!")


@pytest.mark.slow
def test_a_run_is_not_overwritten_unasked(run_capo, tmp_path):
    output = tmp_path / "run"
    arguments = ("train", "small-aggressive", *TINY, "training.steps=1", "-o", output, "-q")
    assert run_capo(*arguments)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    code, _, err = run_capo(*arguments)
    assert code == 2
    assert "--overwrite" in err
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    assert run_capo(*arguments, "--overwrite")[0] == 0


@pytest.mark.slow
def test_ctrl_c_leaves_a_run_that_resumes_to_the_same_weights(run_capo, tmp_path):
    many = [*TINY, "training.steps=30", "training.save_every=30"]
    assert run_capo("train", "small-aggressive", *many, "-o", tmp_path / "whole", "-q")[0] == 0

    run = RunDirectory(tmp_path / "run")
    process = start("train", "small-aggressive", *many, "--output", str(run.path))
    wait_for_lines(run.path / "metrics.jsonl", 2, process)
    process.send_signal(2)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert run.state == "interrupted"
    resume = f"capo train --resume --output {run.path}"
    assert err.splitlines()[-1].endswith(f"continue with: {resume}")

    assert run_capo(*resume.split()[1:])[0] == 0
    assert weights(run.path) == weights(tmp_path / "whole")
    assert [row["step"] for row in run.rows("metrics.jsonl")] == list(range(1, 31))


@pytest.mark.slow
def test_pretrain_writes_a_policy_that_trains(run_capo, tmp_path):
    policy = tmp_path / "policy"
    shorter = [
        f"--set={each}" for each in ("steps=2", "batch_size=4", "eval_problems=4", "eval_k=1")
    ]
    code, out, _ = run_capo("pretrain", "--output", policy, *shorter, "--quiet")
    assert (code, out) == (0, f"policy: {policy}\n")
    code, out, _ = run_capo("eval", policy, "--problems", 4, "--k", 1, "--json")
    assert (code, json.loads(out)["task"]) == (0, "sums")
    output = tmp_path / "run"
    path = f"policy.path={policy}"
    code, _, _ = run_capo(
        "train", "small-aggressive", *TINY, "training.steps=1", path, "-o", output
    )
    assert code == 0
    assert tiny(path, "training.steps=1").policy.path == str(policy)
