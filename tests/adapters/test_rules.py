"""Which weights a rule matches."""

import re

import pytest

from subspace_jax import adapters

PATHS = ["embed/embedding", "layers/attn/q/kernel", "layers/attn/gate_q/kernel", "layers/mlp/up/kernel", "head/kernel"]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("q", [1]),
        ("attn/*", [1, 2]),
        ("*_q", [2]),
        ("layers/**", [1, 2, 3]),
        ("layers/*", []),
        ("layers/*/up", [3]),
        ("**/kernel", [1, 2, 3, 4]),
        ("embed", [0]),
        ("hea?", [4]),
        ("re:layers/(attn|mlp)/(q|up)/kernel", [1, 3]),
        ("re:q", []),
        (re.compile(".*p/kernel"), [3]),
    ],
)
def test_match_rules_matches_globs_at_the_end_and_expressions_in_full(rule, expected):
    if not expected:
        with pytest.raises(ValueError, match="matches none"):
            adapters.match_rules({rule: 1}, PATHS)
        return
    assert list(adapters.match_rules({rule: 1}, PATHS)) == [PATHS[i] for i in expected]


def test_match_rules_takes_the_first_rule_that_matches():
    got = adapters.match_rules({"q": 1, "layers/**": 2}, PATHS)
    assert got == {PATHS[1]: 1, PATHS[2]: 2, PATHS[3]: 2}


def test_match_rules_shows_close_names_for_a_rule_without_a_match():
    with pytest.raises(ValueError, match=r"'atn/q' matches none of 5 weights; near: .*layers/attn/q/kernel"):
        adapters.match_rules({"atn/q": 1}, PATHS)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({}, "at least one"),
        ({"re:(": 1}, "not a regular expression"),
        ({3: 1}, "expected a glob"),
        ({"": 1}, "expected a glob"),
        ({"layers/**": 1, "q": 2}, "earlier rules match everything"),
    ],
)
def test_match_rules_refuses_malformed_rules(rules, message):
    with pytest.raises(ValueError, match=message):
        adapters.match_rules(rules, PATHS)
