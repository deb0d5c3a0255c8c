"""The seeds of a study and SEED that follows from them."""

import pytest

from fbn_plugin.engine.studies.seeds import config_seed, parse_seeds


def test_md5_takes_the_last_32_bits():
    # The digest of "1", which RFC 1321's algorithm gives: c4ca4238a0b923820dcc509a6f75849b.
    assert config_seed(1) == 0x6F75849B
    assert config_seed(2**40) < 2**32 and config_seed(2**40, "plain") == 2**40


@pytest.mark.parametrize(
    ("given", "seeds"),
    [("1-3", [1, 2, 3]), ("1-2, 7", [1, 2, 7]), (5, [5]), ([3, 1], [3, 1]), ([1, "4 - 5"], [1, 4, 5]), (0, [0])],
)
def test_seeds_are_read(given, seeds):
    assert parse_seeds(given) == seeds


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("1-", "whole numbers from 0 on, as 1-15 or [1, 2, 3], got '1-'"),
        (-1, "whole numbers from 0 on, as 1-15 or [1, 2, 3], got -1"),
        (True, "got True"),
        (1.5, "got 1.5"),
        (None, "got None"),
        ({"a": 1}, "got {'a': 1}"),
        (2**63, "must be below 2**63, as SEED is, got 9223372036854775808"),
        (str(2**64), "must be below 2**63, as SEED is, got '18446744073709551616'"),
        ("3-1", "from a smaller number to a larger one, got '3-1'"),
        ("1-1000000000", "at most 10,000 seeds, got '1-1000000000'"),
        ([1, 2, 1], "SEEDS has 1 twice"),
        ([0, 0], "SEEDS has 0 twice"),
        ([], "must be one seed or more, got []"),
    ],
)
def test_other_seeds_are_refused(given, sentence):
    with pytest.raises(ValueError) as error:
        parse_seeds(given)
    assert sentence in str(error.value)
