"""``capo eval``: where it samples, how long a completion may be, and that it says so."""

from __future__ import annotations

import json
import shutil

import torch
from cli_kit import Asked, asked

from capo.lab.devices import Place
from capo.lab.rundir import RunDirectory
from capo.policies.loading import EMBEDDED
from run_kit import tiny


def test_eval_says_where_and_in_which_numbers_it_sampled(run_capo, tmp_path):
    few = ("eval", "embedded:sums", "--device", "cpu", "--dtype", "bfloat16", "--problems", 4)
    code, out, _ = run_capo(*few)
    assert code == 0
    assert "held-out problems of 'sums', at most 24 tokens a completion (cpu, bfloat16)" in out
    document = json.loads(run_capo(*few, "--json")[1])
    assert (document["device"], document["dtype"]) == ("cpu", "bfloat16")

    suite = tmp_path / "suite.toml"
    suite.write_text('[[tasks]]\nname = "few"\ntask = "sums"\nproblems = 4\n')
    on = ("eval", "embedded:sums", "--suite", suite, "-o", tmp_path / "report", "--device", "cpu")
    code, out, _ = run_capo(*on)
    assert code == 0
    assert "sampled on cpu in float32" in out
    document = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert (document["device"], document["dtype"]) == ("cpu", "float32")
    assert "Sampled on `cpu` in float32." in (tmp_path / "report" / "report.md").read_text()


def finished_run(path, *overrides):
    """As a run leaves it, with the embedded policy for its final one."""
    directory = RunDirectory(path)
    path.mkdir()
    shutil.copytree(EMBEDDED["embedded:sums"], directory.final)
    directory.write("config.json", tiny(*overrides).model_dump(mode="json"))
    directory.set_status("finished", 4, 4)
    return path


def test_eval_of_a_run_ends_completions_where_the_run_did(run_capo, monkeypatch, tmp_path):
    run = finished_run(tmp_path / "run", "training.max_completion_tokens=7")
    code, out, _ = run_capo("eval", run, "--problems", 4, "--json")
    assert (code, json.loads(out)["completion_tokens_limit"]) == (0, 7)
    assert "at most 7 tokens a completion" in run_capo("eval", run, "--problems", 4)[1]
    more = ("--max-completion-tokens", 9)  # what is asked for wins
    out = run_capo("eval", run, "--problems", 4, *more, "--json")[1]
    assert json.loads(out)["completion_tokens_limit"] == 9
    code, _, err = run_capo("eval", run, "--suite", "embedded", *more)
    assert (code, err[:30]) == (2, "capo: --max-completion-tokens:")

    task = ('task.name="reasoning_gym"', 'task.params={dataset="spell_backward"}')
    words = finished_run(tmp_path / "words", "training.max_completion_tokens=7", *task)
    monkeypatch.setattr("capo.lab.evaluate.evaluate", limited)
    assert asked(run_capo, "eval", words, "--problems", 4) == (7, 1024)
    own = ("--param", "max_completion_tokens=40")
    assert asked(run_capo, "eval", words, "--problems", 4, *own) == (None, 40)
    assert asked(run_capo, "eval", words, "--problems", 4, "--task", "sums") == (None, 24)


def limited(policy, task, *_, max_completion_tokens, **__):
    raise Asked(max_completion_tokens, task.max_completion_tokens)


def test_eval_loads_a_policy_to_where_the_accelerator_is(run_capo, monkeypatch):
    there = Place(torch.device("cuda"), None)
    monkeypatch.setattr("capo.lab.devices.find_place", lambda *_: there)
    loaded = []

    def load_policy(source, **place):
        loaded.append(place)
        raise Asked

    monkeypatch.setattr("capo.policies.load_policy", load_policy)
    asked(run_capo, "eval", "embedded:sums")
    asked(run_capo, "eval", "embedded:sums", "--suite", "embedded")
    assert loaded == [vars(there)] * 2
