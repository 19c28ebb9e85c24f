"""What CAPO takes from verl's configuration; the rest of the integration is tested in `tests/verl_engine`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import capo
from capo.core.errors import InputError
from capo.integrations._verl_options import Options, check_layout, read_options


def test_nothing_said_is_nothing_done() -> None:
    options = read_options({})
    assert not options.on
    assert options.rule() is None
    assert options.region() is None


def test_rules_and_regions_are_the_cores() -> None:
    options = read_options({"selection": "capo", "trust_region": {"policy_shift": 1e-3}})
    assert options.on
    assert options.rule() == capo.PAPER_THRESHOLDS["capo"]
    assert options.region() == capo.TrustRegion(policy_shift=1e-3)
    assert options.curvature == {
        "fisher": "sampled",
        "top_k": 50,
        "renormalize": True,
        "impl": "auto",
    }


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("step_model", "muon", "must be 'adam' or 'sgd', got 'muon'."),
        ("moments", "real", "must be 'simulated' or 'optimizer', got 'real'."),
        ("fisher", "empirical", "must be 'sampled' or 'exact', got 'empirical'."),
        ("curvature_top_k", 0, "must be an integer ≥ 1 or null, got 0."),
        ("curvature_top_k", True, "must be an integer ≥ 1 or null, got True."),
        ("renormalize", "yes", "must be true or false, got 'yes'."),
        ("grad_scale", 0.0, "must be a positive number, got 0.0."),
        ("selection", 3, "must be a preset's name or a dict, got 3."),
        ("selection", {"rule": "best"}, "must be one of"),
        ("trust_region", -1.0, "must be None, 'auto', a policy shift > 0"),
        ("trust_region", {"predictor": "deep"}, "must be 'measured' or 'head' in verl."),
        ("trust_region", {"step_length": "quadratic"}, "must be 'radius' in verl"),
    ],
)
def test_what_is_not_allowed_is_said_in_one_sentence(key: str, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=r"^fsdp_config\.capo\." + key) as refused:
        read_options({key: value})
    assert message in str(refused.value)
    assert str(refused.value).count("\n") == 0


def test_an_unknown_key_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="is not known; allowed are selection, trust_region, "):
        read_options({"selektion": "capo"})


def layout(**changes: Any) -> tuple[Any, Any]:
    model = {"use_fused_kernels": False, "hf_config": SimpleNamespace(tie_word_embeddings=False)}
    engine = {"strategy": "fsdp2", "ulysses_sequence_parallel_size": 1, "offload_policy": False}
    for name, value in changes.items():
        (model if name in model else engine)[name] = value
    return SimpleNamespace(**model), SimpleNamespace(**engine)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"strategy": "fsdp"}, "actor_rollout_ref.actor.strategy"),
        (
            {"ulysses_sequence_parallel_size": 2},
            "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size",
        ),
        ({"offload_policy": True}, "actor_rollout_ref.actor.fsdp_config.offload_policy"),
        ({"use_fused_kernels": True}, "actor_rollout_ref.model.use_fused_kernels"),
    ],
)
def test_a_layout_that_cannot_be_seen_through_is_refused(
    changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(InputError) as refused:
        check_layout(*layout(**changes))
    assert refused.value.field == field


def test_fused_kernels_are_allowed_with_a_tied_head() -> None:
    tied = SimpleNamespace(tie_word_embeddings=True)
    check_layout(*layout(use_fused_kernels=True, hf_config=tied))


def test_options_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Options().selection = "capo"  # type: ignore[misc]
