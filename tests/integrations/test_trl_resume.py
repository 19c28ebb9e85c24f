"""A resumed run ends with the weights of an uninterrupted one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from capo import InputError
from capo.integrations._trl_state import STATE_FILE

from . import trl_kit as kit

JUDGED: dict[str, Any] = {
    "selection": {"objective_shift": [-0.1, 0.1], "policy_shift": 0.02},
    "curvature_top_k": 8,
    "save_strategy": "steps",
    "max_steps": 4,
    "lr_scheduler_type": "cosine",
}


@pytest.mark.parametrize(
    "settings",
    [
        {"save_steps": 2},
        {"save_steps": 2, "num_iterations": 2, "gradient_accumulation_steps": 2},
        {"save_steps": 2, "moments": "optimizer"},
        {"save_steps": 2, "step_model": "sgd"},
    ],
    ids=["simulated", "iterated", "optimizer", "sgd"],
)
def test_resumed_weights_are_the_same(tmp_path: Path, settings: dict[str, Any]) -> None:
    whole = kit.trainer(tmp_path / "whole", **JUDGED, **settings)
    whole.train()
    resumed = kit.trainer(tmp_path / "resumed", **JUDGED, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    kit.assert_same_weights(kit.weights(whole), kit.weights(resumed))
    saved = (tmp_path / "whole" / "checkpoint-2" / STATE_FILE).exists()
    assert saved == (settings.keys() == {"save_steps"} or "num_iterations" in settings)
    rates = [
        [row["capo/rejection_rate"] for row in t.state.log_history if "capo/rejection_rate" in row]
        for t in (whole, resumed)
    ]
    assert rates[0] == rates[1]
    assert any(0 < rate < 1 for rate in rates[0])


def test_it_matters_that_the_moments_are_restored(tmp_path: Path) -> None:
    """The test above would pass emptily if empty moments judged alike."""
    whole = kit.trainer(tmp_path / "whole", **JUDGED, save_steps=2)
    whole.train()
    resumed = kit.trainer(tmp_path / "resumed", **JUDGED, save_steps=2)
    resumed._judge.step_model.load_state_dict = lambda _: None
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    ours, theirs = kit.weights(resumed), kit.weights(whole)
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("trust_region", [None, 1e-3])  # whose own state is in the same file
def test_checkpoint_without_moments_is_refused(tmp_path: Path, trust_region: float | None) -> None:
    settings = {**JUDGED, "save_steps": 2, "trust_region": trust_region}
    plain = kit.trainer(tmp_path / "plain", **{**settings, "selection": None})
    plain.train()
    resumed = kit.trainer(tmp_path / "resumed", **settings)
    with pytest.raises(InputError, match=r"^resume_from_checkpoint: .*no simulated moments"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-2"))
