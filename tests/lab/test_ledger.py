"""The tokens that a step moved, the alarms, and both after a kill."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from capo.lab.config import Config
from capo.lab.ledger import CONTEXT, Alarms, Ledger, moved_tokens
from capo.lab.rundir import RunDirectory
from capo.lab.sources import load_config

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def decode(ids: list[int]) -> str:
    return "".join(ALPHABET[i % 26] for i in ids)


@dataclass(frozen=True)
class Record:
    """As the trainer's `ShiftRecord`; right-padded completions, left-padded prompts."""

    step: int
    token_ids: Tensor
    mask: Tensor
    divergence: Tensor
    advantage: Tensor
    log_ratio: Tensor
    prompt_ids: Tensor
    prompt_mask: Tensor


def record(divergence: list[list[float]], lengths: list[int], step: int = 1) -> Record:
    values = torch.tensor(divergence)
    n, width = values.shape
    mask = torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]
    return Record(
        step=step,
        token_ids=torch.arange(n * width).reshape(n, width),
        mask=mask,
        divergence=values,
        advantage=torch.arange(n)[:, None].expand(n, width).float(),
        log_ratio=-values,
        prompt_ids=torch.tensor([[0, 23, 24]] * n),
        prompt_mask=torch.tensor([[False, True, True]] * n),
    )


def test_the_tokens_that_moved_most_with_their_share_and_context():
    moved = moved_tokens(
        record([[0.1, 0.4, 0.0, 9.0], [0.2, 0.0, 0.3, 0.0]], lengths=[3, 4]), decode, count=2
    )
    first, second = moved
    # 9.0 is padding; the rest sums to 1.
    assert (first["token"], first["before"], first["after"]) == ("b", "a", "c")
    assert first["prompt"] == "xy"
    assert first["share"] == pytest.approx(0.4)
    assert first["divergence"] == pytest.approx(0.4)
    assert (first["advantage"], first["log_ratio"]) == pytest.approx((0.0, -0.4))
    assert (second["token"], second["before"], second["after"]) == ("g", "ef", "h")
    assert (second["share"], second["advantage"]) == pytest.approx((0.3, 1.0))


def test_what_was_not_measured_or_did_not_move_is_not_named():
    nan = float("nan")
    (only,) = moved_tokens(record([[nan, 0.5, -1e-9, 0.0]], lengths=[4]), decode)
    assert (only["token"], only["share"]) == ("b", 1.0)
    assert moved_tokens(record([[0.0, nan]], lengths=[2]), decode) == []
    assert moved_tokens(record([[0.5, 0.5]], lengths=[0]), decode) == []


def test_long_completions_are_cut_around_the_token():
    width = 3 * CONTEXT
    divergence = [0.0] * width
    divergence[40] = 1.0
    (moved,) = moved_tokens(record([divergence], lengths=[width]), decode)
    assert moved["prompt"] == ""
    assert moved["before"] == "…" + decode(list(range(40 - CONTEXT, 40)))
    assert moved["after"] == decode(list(range(41, 41 + CONTEXT))) + "…"


# Alarms of a whole stream of rows


@pytest.fixture
def config() -> Config:
    return load_config("small-aggressive", ["capo.trust_region={policy_shift='none'}"])


def rows(steps: int, broken: int) -> list[dict]:
    """The rows of a run that takes one far step and then answers everything wrong."""
    found = []
    for step in range(1, steps + 1):
        found.append(
            {
                "step": step,
                "completions": 96 * step,
                "seconds": float(step),
                "reward": 0.0 if step > broken else 0.6,
                "completions/mean_length": 20.0,
                "capo/trust/measured_policy_shift": 0.3 if step == broken else 2e-3,
            }
        )
    return found


def evaluation(step: int, accuracy: float) -> dict:
    return {"step": step, "completions": 96 * step, "seconds": 0.0, "accuracy": accuracy}


def feed(config, directory, metrics, said, *, every=4, broken=10, start=0, stop=None):
    """What the recorder does, from ``start`` up to and with ``stop``."""
    ledger = Ledger(directory, decode)
    alarms = Alarms(config, directory, ledger, said.append)
    if start == 0:
        directory.append("evals.jsonl", evaluation(0, 0.5))
        alarms.evaluated(evaluation(0, 0.5))
    for row in metrics[start:stop]:
        step = row["step"]
        ledger(record([[0.1, 0.4, 0.5 + step]], lengths=[3], step=step))
        if step % every == 0:
            measured = evaluation(step, 0.0 if step >= broken else 0.5)
            directory.append("evals.jsonl", measured)
            alarms.evaluated(measured)
        directory.append("metrics.jsonl", row)
        alarms.stepped(row)


@pytest.fixture
def directory(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.write("config.json", {})
    return directory


def test_alarms_name_the_step_and_its_tokens(config, directory):
    said: list[str] = []
    feed(config, directory, rows(20, broken=10), said)
    alarms = directory.rows("alarms.jsonl")
    assert [(row["step"], row["kind"], row["began"]) for row in alarms] == [
        (10, "policy shift", 10),
        (12, "reward", 10),
        (12, "accuracy", 10),
    ]
    for row, words in zip(alarms, said, strict=True):
        assert row["completions"] == 96 * row["step"]
        assert [one["token"] for one in row["moved"]] == ["c", "b", "a"]
        assert row["moved"][0]["share"] == pytest.approx(10.5 / 11)
        assert row["sentence"] in words
        assert words.startswith("alarm: ")
        assert "step 10 moved most: 'c' (95%)" in words
    assert [row["step"] for row in directory.rows("ledger.jsonl")] == list(range(1, 21))


@pytest.mark.parametrize("checkpoint", [0, 3, 9, 10, 11, 12, 14])
def test_a_continued_run_raises_the_same_alarms(config, directory, tmp_path, checkpoint):
    metrics = rows(20, broken=10)
    whole = RunDirectory(tmp_path / "whole")
    whole.path.mkdir()
    feed(config, whole, metrics, [])
    # Killed after step 13, its last checkpoint before that.
    feed(config, directory, metrics, [], stop=max(13, checkpoint))
    directory.rewind(checkpoint)
    feed(config, directory, metrics, said := [], start=checkpoint)
    for name in ("alarms.jsonl", "ledger.jsonl", "metrics.jsonl"):
        assert directory.rows(name) == whole.rows(name)
    # What was said before the checkpoint is not said again.
    assert len(said) == sum(row["step"] > checkpoint for row in whole.rows("alarms.jsonl"))


def test_steps_that_are_measured_in_the_next_pass(config, directory):
    """With several steps on the same completions only the first logs length and reward."""
    metrics = rows(20, broken=6)
    for row in metrics:
        if row["step"] % 2 == 0:
            for key in ("reward", "completions/mean_length"):
                del row[key]
            previous = metrics[row["step"] - 2]
            row["capo/trust/last_measured_policy_shift"] = previous[
                "capo/trust/measured_policy_shift"
            ]
    late = metrics[6]  # step 7 shows what step 6, unmeasured in its own pass, has done
    late["capo/trust/last_measured_policy_shift"] = metrics[5].pop(
        "capo/trust/measured_policy_shift"
    )
    feed(config, directory, metrics, [], every=100)
    first, second = directory.rows("alarms.jsonl")
    assert (first["step"], first["kind"], first["began"]) == (7, "policy shift", 6)
    assert "step 6 moved the policy by 0.3 nats a token" in first["sentence"]
    assert (second["kind"], second["began"]) == ("reward", 6)


def test_a_run_without_ledger_still_watches_its_reward(config, directory):
    metrics = rows(20, broken=10)
    alarms = Alarms(config, directory, None, (said := []).append)
    for row in metrics:
        del row["capo/trust/measured_policy_shift"]
        alarms.stepped(row)
    (alarm,) = directory.rows("alarms.jsonl")
    assert (alarm["kind"], alarm["moved"]) == ("reward", [])
    assert said == [f"alarm: {alarm['sentence']}"]
