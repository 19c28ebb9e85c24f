"""The model card and the tag that a trained policy carries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from trl import GRPOTrainer

from capo import CurvatureMonitor
from capo.integrations.trl import card_section

from . import trl_kit as kit


def card_of(trainer: Any) -> ModelCard:
    trainer.train()
    trainer.create_model_card(model_name="sums")
    return ModelCard.load(Path(trainer.args.output_dir) / "README.md")


def test_a_card_says_what_was_done(tmp_path: Path) -> None:
    instance = kit.trainer(
        tmp_path,
        trust_region={"policy_shift": 1e-3},
        selection={"policy_shift": 1e-3},
        curvature_top_k=None,
    )
    card = card_of(instance)
    assert {"trl", "grpo", "capo", "generated_from_trainer"} <= set(card.data.tags)
    assert {"trl", "grpo", "capo"} <= set(instance.model.model_tags)
    for part in (
        "This model was trained with CAPO",
        "https://huggingface.co/papers/2510.00819",
        "@inproceedings{melo2026stabilizing",
        "- trust region: `{'policy_shift': 0.001}`",
        "- passes over a batch: 1",
    ):
        assert part in card.text
    scales = [
        row["capo/trust/scale"] for row in instance.state.log_history if "capo/trust/scale" in row
    ]
    (line,) = [one for one in card.text.splitlines() if "share of the optimizer's step" in one]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert float(cells[2]) == pytest.approx(min(scales), rel=1e-2)
    assert float(cells[3]) == pytest.approx(max(scales), rel=1e-2)
    section, versions = card.text.index("### Curvature"), card.text.index("### Framework versions")
    assert section < versions
    assert card.text.count("### Curvature") == 1


def test_trl_writes_the_same_card_but_for_that(tmp_path: Path) -> None:
    stock = card_of(kit.trainer(tmp_path / "stock", cls=GRPOTrainer))
    ours = card_of(kit.trainer(tmp_path / "ours"))
    headings = [[one for one in c.text.splitlines() if one.startswith("#")] for c in (stock, ours)]
    assert [one for one in headings[1] if one != "### Curvature of the policy"] == headings[0]


def test_a_monitored_run_has_a_section_to_paste(tmp_path: Path) -> None:
    instance = kit.trainer(tmp_path / "calm", cls=GRPOTrainer, learning_rate=1e-5)
    CurvatureMonitor(instance)
    instance.train()
    section = card_section(instance)
    assert "policy shift of a step, nats a token (measured, monitor)" in section
    assert "No early warning was raised." in section
    assert "trust region:" not in section
    wild = kit.trainer(tmp_path / "wild", cls=GRPOTrainer, learning_rate=0.3, max_steps=6)
    monitor = CurvatureMonitor(wild)
    wild.train()
    assert monitor.warnings[0].sentence in card_section(wild)
