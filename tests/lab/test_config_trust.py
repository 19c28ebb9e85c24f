"""``[capo.trust_region]``: the words, the numbers and the table that it may be."""

from __future__ import annotations

import dataclasses
import json

import pytest

import capo
from capo import InputError
from capo.lab.config import parse_config
from capo.lab.sources import load_config
from capo.lab.trust import TrustRegionTable

PLAIN = "small-aggressive"  # without a trust region


def table(*overrides: str) -> TrustRegionTable:
    found = load_config(PLAIN, list(overrides)).capo.trust_region
    assert found is not None
    return found


def test_off_by_default_and_old_records_stay_readable():
    config = load_config(PLAIN)
    assert config.capo.trust_region is None
    assert config.capo.ledger is None
    recorded = json.loads(config.model_dump_json())
    del recorded["capo"]["trust_region"]
    assert parse_config(recorded).identity() == config.identity()


@pytest.mark.parametrize(
    ("value", "policy_shift"),
    [
        ("auto", "auto"),
        ("3e-3", 3e-3),
        ("1", 1.0),
        ("{policy_shift=3e-3}", 3e-3),
        ("{policy_shift='none'}", None),
        ("{policy_shift=inf}", None),
        ("{}", "auto"),
        ("{policy_shift=2e-3, predictor='head', sequences=4, depth=1}", 2e-3),
        ("{sequences='all'}", "auto"),
    ],
)
def test_every_form_is_a_table_that_survives_json(value, policy_shift):
    config = load_config(PLAIN, [f"capo.trust_region={value}"])
    found = config.capo.trust_region
    assert found.policy_shift == policy_shift
    assert parse_config(json.loads(config.model_dump_json())) == config
    assert capo.make_trust_region(found.spec()).policy_shift == policy_shift


def test_what_is_left_out_is_written_out_as_the_core_has_it():
    assert table("capo.trust_region=auto").spec() == dataclasses.asdict(capo.TrustRegion())
    assert table("capo.trust_region={sequences='all'}").sequences is None
    same = [load_config(PLAIN, [f"capo.trust_region={v}"]) for v in ("auto", "{}")]
    assert same[0].identity() == same[1].identity()


def test_dotted_keys_and_words_that_switch_it_off():
    assert table("capo.trust_region.policy_shift=2e-3").policy_shift == 2e-3
    inherited = "capo.trust_region=auto"
    assert table(inherited, "capo.trust_region.sequences=4").sequences == 4
    assert load_config(PLAIN, [inherited, "capo.trust_region=none"]).capo.trust_region is None


def test_watching_keeps_the_ledger_too():
    watched = load_config(PLAIN, ["capo.watch=true"]).capo
    assert watched.trust_region is None
    assert watched.ledger.policy_shift is None
    both = load_config(PLAIN, ["capo.watch=true", "capo.trust_region=1e-3"]).capo
    assert both.ledger == both.trust_region
    assert both.ledger.policy_shift == 1e-3


@pytest.mark.parametrize(
    ("value", "key", "says"),
    [
        ("0", "", "number > 0 (nats a token), got 0"),
        ("-1.0", "", "got -1.0"),
        ("true", "", "'none', 'auto', a policy shift > 0 in nats a token, or a table"),
        ("of", "", "got 'of'"),
        ("{policy_shft=1.0}", ".policy_shft", "did you mean 'policy_shift'"),
        ("{policy_shift='x'}", ".policy_shift", "'auto', 'none' or a number > 0"),
        ("{policy_shift=-1.0}", ".policy_shift", "got -1.0"),
        ("{policy_shift=true}", ".policy_shift", "got True"),
        ("{policy_shift=nan}", ".policy_shift", "got nan"),
        ("{predictor='magic'}", ".predictor", "'measured', 'deep' or 'head', got 'magic'"),
        ("{sequences=0}", ".sequences", "must be 'auto', 'all' or an integer ≥ 1, got 0"),
        ("{depth=-1}", ".depth", "'all' or an integer ≥ 0, got -1"),
        ("{depth=true}", ".depth", "got True"),
        ("{cruise=2.0}", ".cruise", "must be in (0, 1], got 2.0"),
    ],
)
def test_bad_values_are_named_by_their_key(value, key, says):
    with pytest.raises(InputError) as error:
        load_config(PLAIN, [f"capo.trust_region={value}"])
    assert error.value.field == f"capo.trust_region{key}"
    assert says in error.value.message
    assert "\n" not in str(error.value)
