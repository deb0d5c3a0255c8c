"""Tests against a margin and a number, held against SciPy's and against simulation."""

import numpy as np
import pytest

stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
from fbn_plugin.engine.studies.equivalence import _power, equivalence_p, mean_p, seeds_for_equivalence  # noqa: E402


def test_p_are_those_of_scipys_one_sided_tests():
    values = np.random.default_rng(0).normal(0.2, 1.0, 12)
    mean, sd, n = values.mean(), values.std(ddof=1), len(values)
    for number in (0.0, -0.7, 1.3):
        expected = [stats.ttest_1samp(values, number, alternative=side).pvalue for side in ("greater", "less")]
        assert mean_p(mean, sd, n, number) == pytest.approx(expected, rel=1e-9)
    within = max(
        stats.ttest_1samp(values, 1.0, alternative="less").pvalue,
        stats.ttest_1samp(values, -1.0, alternative="greater").pvalue,
    )
    assert equivalence_p(mean, sd, n, 1.0)[0] == pytest.approx(within, rel=1e-9)


def test_beyond_the_margin_on_either_side():
    for mean in (5.0, -5.0):
        within, beyond = equivalence_p(mean, 1.0, 10, 1.0)
        assert within > 0.999 and beyond < 1e-5
    assert equivalence_p(1.0, 1.0, 10, 1.0) == (0.5, 1.0)  # at the margin


def test_power_is_that_of_a_simulation():
    draws = np.random.default_rng(0).normal(0.3, 1.0, (20_000, 14))
    t = np.sqrt(14) / draws.std(axis=1, ddof=1)
    passed = ((draws.mean(axis=1) + 1) * t > stats.t.isf(0.05, 13)) & (
        (draws.mean(axis=1) - 1) * t < -stats.t.isf(0.05, 13)
    )
    assert _power(0.3, 1.0, 14, 0.05) == pytest.approx(passed.mean(), abs=0.01)


def test_seeds_needed_have_the_power_and_one_less_has_not():
    for effect, margin in ((0.0, 1.0), (0.3, 1.0), (-0.3, 1.0), (0.0, 0.2)):
        n = seeds_for_equivalence(2 * effect, 2.0, 2 * margin)
        assert _power(effect, margin, n, 0.05) >= 0.8 > _power(effect, margin, n - 1, 0.05)
    assert seeds_for_equivalence(1.0, 0.1, 1.0) is None
