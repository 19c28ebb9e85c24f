"""Runs: what they write, what disturbs them (nothing), and how they continue."""

from __future__ import annotations

import json
import shutil
import signal

import numpy as np
import pytest

from capo import InputError
from capo.lab.ingredients import accuracy_reward
from capo.lab.progress import Progress
from capo.lab.run import Interrupted, train
from capo.lab.rundir import RunDirectory
from capo.policies import load_policy
from capo.tasks import load_task
from run_kit import SignalAt, start, tiny, wait_for_lines, weights

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """An uninterrupted run without selection."""
    return train(tiny(), tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """An uninterrupted run with the paper's algorithm."""
    config = tiny(preset="small-aggressive-capo")
    return train(config, tmp_path_factory.mktemp("judged") / "run")


def test_a_run_directory_is_complete(plain):
    run = RunDirectory(plain)
    config = tiny()
    assert run.read("config.json") == config.model_dump(mode="json")
    assert run.read("status.json") == {"state": "finished", "step": 4, "steps": 4, "message": ""}
    metrics = run.rows("metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    assert [row["completions"] for row in metrics] == [16, 32, 48, 64]
    assert all({"reward", "loss", "entropy", "grad_norm"} <= row.keys() for row in metrics)
    seconds = [row["seconds"] for row in metrics]
    assert seconds == sorted(seconds)
    evals = run.rows("evals.jsonl")
    assert [(row["step"], row["completions"]) for row in evals] == [(0, 0), (2, 32), (4, 64)]
    assert {row["problems"] for row in evals} == {8}
    assert run.last_checkpoint()[0] == 4
    provenance = run.read("provenance.json")
    assert {"capo_version", "python", "packages", "hardware", "command", "started"} <= set(
        provenance
    )


def test_the_final_policy_is_a_model_directory_and_has_moved(plain):
    before = load_policy("embedded:sums").model.state_dict()
    after = load_policy(plain / "final").model.state_dict()
    assert before.keys() == after.keys()
    assert any((before[name] != after[name]).any() for name in before)


def test_the_learning_rate_follows_the_schedule(plain):
    rates = [row["learning_rate"] for row in RunDirectory(plain).rows("metrics.jsonl")]
    # warm-up of one step out of four (rounded up), then half a cosine over the three others
    peak = tiny().training.learning_rate
    expected = [0, *(0.5 * peak * (1 + np.cos(np.pi * done / 3)) for done in range(3))]
    assert rates == pytest.approx(expected)


def test_token_records_are_ragged_and_whole(judged):
    config = tiny(preset="small-aggressive-capo")
    vocabulary = json.loads((judged / "tokens" / "vocab.json").read_text())
    files = sorted((judged / "tokens").glob("step-*.npz"))
    assert [path.name for path in files] == [f"step-{step:06d}.npz" for step in (1, 2, 3, 4)]
    metrics = RunDirectory(judged).rows("metrics.jsonl")
    for path, row in zip(files, metrics, strict=True):
        record = np.load(path)
        offsets = record["offsets"]
        assert len(offsets) == config.training.completions_per_step + 1
        assert (np.diff(offsets) >= 1).all()
        assert (np.diff(offsets) <= load_task("sums").max_completion_tokens).all()
        for name in ("token_ids", "log_prob", "entropy", "advantage", "policy_shift", "reason"):
            assert record[name].shape == (offsets[-1],), name
        assert (record["log_prob"] <= 0).all()
        assert (record["policy_shift"] >= 0).all()
        rejected = (record["reason"] != 0).mean()
        assert (record["weight"] == 0).mean() == pytest.approx(rejected)
        # the logged rate is a mean over micro-batches of unequal numbers of tokens
        assert row["capo/rejection_rate"] == pytest.approx(rejected, abs=0.05)
        prompts = record["prompt_ids"], record["prompt_offsets"]
        first = "".join(vocabulary[str(i)] for i in prompts[0][: prompts[1][1]])
        assert first.endswith("?")


def test_without_judging_there_are_no_records(plain):
    assert not list((plain / "tokens").glob("*.npz"))


def test_records_can_be_switched_off(tmp_path):
    config = tiny("training.steps=1", "records.tokens=false", preset="small-aggressive-capo")
    assert not (train(config, tmp_path / "run") / "tokens").exists()


@pytest.mark.parametrize(
    "change",
    ["eval.every_completions=16", "eval.seed=5", "records.tokens=false", "training.save_every=4"],
)
def test_looking_at_a_run_does_not_change_it(plain, tmp_path, change):
    assert weights(train(tiny(change), tmp_path / "run")) == weights(plain)


def test_watching_the_tokens_does_not_change_a_run(plain, tmp_path):
    watched = train(tiny("capo.watch=true"), tmp_path / "run")
    assert weights(watched) == weights(plain)
    assert len(list((watched / "tokens").glob("*.npz"))) == 4
    for row in RunDirectory(watched).rows("metrics.jsonl"):
        assert row["capo/rejection_rate"] == 0


def test_the_seed_changes_a_run(plain, tmp_path):
    assert weights(train(tiny("run.seed=1"), tmp_path / "run")) != weights(plain)


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm.name=dr_grpo"],
        ["algorithm.name=reinforce", "capo.selection=reincapo"],
        ["training.optimizer=sgd", "capo.step_model=sgd", "capo.selection=capo"],
        ["capo.selection={policy_shift=1e-5, objective_shift=[-inf, 0.1], denominator='all'}"],
        ["algorithm.beta=0.01", "algorithm.epsilon_high=0.28"],
        ["training.top_k=10", "training.temperature=0.9", "training.max_prompt_tokens=64"],
    ],
)
def test_other_algorithms_run(tmp_path, overrides):
    run = RunDirectory(train(tiny("training.steps=2", *overrides), tmp_path / "run"))
    assert run.state == "finished"
    if any("selection" in override for override in overrides):
        assert all("capo/policy_shift/p50" in row for row in run.rows("metrics.jsonl"))


@pytest.mark.parametrize("preset", ["small-aggressive", "small-aggressive-capo"])
def test_a_signal_leaves_a_run_that_continues_exactly(tmp_path, request, preset):
    config = tiny("training.save_every=4", preset=preset)
    whole = request.getfixturevalue("judged" if preset.endswith("capo") else "plain")
    with pytest.raises(Interrupted) as stopped:
        train(config, tmp_path / "run", progress=SignalAt(2, signal.SIGTERM))
    run = RunDirectory(tmp_path / "run")
    assert (stopped.value.step, run.state, run.last_checkpoint()[0]) == (3, "interrupted", 3)
    assert "--resume" in run.read("status.json")["message"]
    train(tiny("training.save_every=4", preset=preset), run.path, resume=True)
    assert weights(run.path) == weights(whole)
    assert [row["step"] for row in run.rows("metrics.jsonl")] == [1, 2, 3, 4]
    assert [row["step"] for row in run.rows("evals.jsonl")] == [0, 2, 4]
    assert len(run.read("provenance.json")["resumed"]) == 1


def test_reused_completions_are_never_cut_in_two(tmp_path):
    config = tiny("algorithm.num_iterations=2", "training.steps=8")
    whole = train(config, tmp_path / "whole")
    with pytest.raises(Interrupted) as stopped:
        train(config, tmp_path / "run", progress=SignalAt(2))
    assert stopped.value.step == 4  # the pair of steps under way is finished
    assert weights(train(config, tmp_path / "run", resume=True)) == weights(whole)


def test_a_second_epoch_continues_exactly(tmp_path):
    config = tiny("task.train_problems=3")  # two prompts a step: epochs of one step and a half
    whole = train(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run", progress=SignalAt(2))
    assert weights(train(config, tmp_path / "run", resume=True)) == weights(whole)


def test_a_failure_is_reported_in_the_run(tmp_path):
    class Broken(Progress):
        def stepped(self, row):
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        train(tiny(), tmp_path / "run", progress=Broken())
    status = RunDirectory(tmp_path / "run").read("status.json")
    assert (status["state"], status["message"]) == ("failed", "RuntimeError: out of luck")


def test_resuming_with_another_configuration_is_refused(plain):
    before = sorted(plain.rglob("*"))
    with pytest.raises(
        InputError, match=r"training\.learning_rate: .* cannot be resumed with 0\.1"
    ):
        train(tiny("training.learning_rate=0.1"), plain, resume=True)
    assert sorted(plain.rglob("*")) == before


def test_resuming_a_finished_run_does_nothing(plain):
    before = (plain / "status.json").stat().st_mtime_ns
    assert train(tiny(), plain, resume=True) == plain
    assert (plain / "status.json").stat().st_mtime_ns == before


def test_a_run_killed_before_it_says_that_it_is_finished_can_be_resumed(plain, tmp_path):
    copy = RunDirectory(shutil.copytree(plain, tmp_path / "run"))
    copy.set_status("running", 4, 4)
    (copy.final / "of-another-kill").write_text("")
    train(tiny(), copy.path, resume=True)
    assert copy.state == "finished"
    assert weights(copy.path) == weights(plain)
    assert not (copy.final / "of-another-kill").exists()


def test_overwriting_replaces_the_whole_run(tmp_path):
    train(tiny(preset="small-aggressive-capo"), tmp_path / "run")
    train(tiny("training.steps=1"), tmp_path / "run", overwrite=True)
    run = RunDirectory(tmp_path / "run")
    assert [row["step"] for row in run.rows("metrics.jsonl")] == [1]
    assert not list(run.tokens.glob("*.npz"))


@pytest.mark.parametrize("preset", ["small-aggressive", "small-aggressive-capo"])
def test_a_killed_process_continues_from_its_last_checkpoint(tmp_path, preset):
    many = tiny("training.steps=14", "records.tokens=false", preset=preset)
    whole = train(many, tmp_path / "whole")
    run = RunDirectory(tmp_path / "run")
    config = tmp_path / "config.json"
    config.write_text(many.model_dump_json())
    process = start("train", str(config), "--output", str(run.path))
    wait_for_lines(run.path / "metrics.jsonl", 5, process)
    process.kill()
    process.communicate()
    assert run.state == "running"  # it had no time to say otherwise
    assert 2 <= run.last_checkpoint()[0] < 14
    train(many, run.path, resume=True)
    assert weights(run.path) == weights(whole)
    assert [row["step"] for row in run.rows("metrics.jsonl")] == list(range(1, 15))
    assert [row["step"] for row in run.rows("evals.jsonl")] == list(range(0, 15, 2))


def test_the_reward_is_the_grader():
    task = load_task("sums")
    first, second = task.train_problems(2, seed=0)
    reward = accuracy_reward(task)
    texts = [f"0={first.answer}", f"0={first.answer}"]
    columns = {name: [getattr(p, name) for p in (first, second)] for name in ("answer", "id")}
    assert reward(prompts=[first.prompt, second.prompt], completions=texts, **columns) == [1.0, 0.0]
