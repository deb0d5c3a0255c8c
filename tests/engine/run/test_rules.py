"""Rules for the values of a config: what each accepts, and the sentence that refuses the rest."""

import math

import pytest

from fbn_plugin.engine.run.rules import (
    Rule,
    above,
    at_least,
    between,
    check_norms,
    check_values,
    each,
    each_of,
    exactly,
    from_to_below,
    get_value,
    increasing,
    multiple_of,
    named,
    of_length,
    one_of,
    or_zero,
)


@pytest.mark.parametrize(
    "rule, accepted, refused",
    [
        (exactly(False, "in this tool"), [False], [True]),
        (one_of("a", 3), ["a", 3], ["b", 4, None]),
        (at_least(1), [1, 2.5], [0, -1, math.inf, math.nan]),
        (at_least(1, 9), [1, 9], [0, 10, math.inf, math.nan]),
        (above(0), [0.1, 3], [0, -1.0, math.inf, math.nan]),
        (above(0, 9), [0.1, 9], [0, 10, math.inf, math.nan]),
        (from_to_below(0, 1), [0, 0.9], [-0.1, 1, math.nan]),
        (or_zero(above(5)), [0, 6], [5, -1, math.nan]),
        (each_of(2, at_least(1)), [(1,), [2, 3]], [(), (0,), (1, 2, 3)]),
        (between(0, 1), [0, 0.5, 1], [-0.1, 1.1, math.nan]),
        (each(at_least(1)), [(1, 2), [3], 4], [(), (1, 0), 0]),
        (of_length(2), [[1, -1]], [[1], [1, 2, 3]]),
        (of_length(2, above(0)), [(1, 2)], [(1, 0), (1,)]),
        (multiple_of(4), [0, 8], [6]),
        (increasing("steps"), [(), (1, 3)], [(3, 1), (1, 1), (0, 2), (2**40,)]),
    ],
    ids=lambda value: value.what if isinstance(value, Rule) else "",
)
def test_what_rules_accept(rule, accepted, refused):
    assert all(rule.accepts(value) for value in accepted)
    assert not any(rule.accepts(value) for value in refused)


def test_a_value_is_refused_in_one_sentence():
    cfg = {"A": {"B": 1, "C": "many"}}
    assert get_value(cfg, "A.B") == 1
    check_values(cfg, {"A.B": at_least(1), "A.C": one_of("few", "many")})
    with pytest.raises(ValueError, match="^A.B must be 2 or more, got 1$"):
        check_values(cfg, {"A.B": at_least(2)})
    with pytest.raises(ValueError, match="^A.C must be above 0, got 'many'$"):  # of a type that cannot be compared
        check_values(cfg, {"A.C": above(0)})
    with pytest.raises(ValueError, match="^A.B must be 3 with A.C, got 1$"):
        check_values(cfg, {"A.B": exactly(3, "with A.C")})
    with pytest.raises(ValueError, match="^A.C must be one of 'few', 'any', got 'many'; did you mean 'any'[?]$"):
        check_values(cfg, {"A.C": one_of("few", "any")})


def test_norms_are_named_by_their_keys():
    check_norms({"FPN.NORM": "", "NORM": "FBN(t_sigma=4)"})
    with pytest.raises(ValueError, match="^NORM must be the spec of a norm, got 'FBM': .*did you mean 'FBN'"):
        check_norms({"FPN.NORM": "BN", "NORM": "FBM"})


def test_a_key_in_front_of_a_sentence():
    for kind in (FileNotFoundError, ValueError):
        with pytest.raises(kind, match="^A.KEY: there is no such thing$"), named("A.KEY"):
            raise kind("there is no such thing")
    with pytest.raises(ZeroDivisionError), named("A.KEY"):
        raise ZeroDivisionError
