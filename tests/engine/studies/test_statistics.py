"""What a study's figures say, against figures computed by hand, textbooks, simulations, and laws."""

import dataclasses
import doctest
import itertools
import math
import random
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_study import LOSS, TOP1, changed, draw, plain_study, product_study

pytest.importorskip("scipy", reason="scipy is not installed")
from fbn_plugin.engine.studies import statistics
from fbn_plugin.engine.studies.outcomes import Comparison, Variant
from fbn_plugin.engine.studies.statistics import (
    bootstrap_interval,
    compare,
    compared_factor,
    compared_sets,
    holm,
    paired_t,
    seeds_needed,
    signed_rank,
    statistics_block,
    study_statistics,
    summarize,
    t_interval,
)

# Student's ten patients (Biometrika 1908): hours of sleep won by two drugs.
DEXTRO = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
LAEVO = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
# Darwin's fifteen pairs of maize, crossed minus self-fertilized, in eighths of an inch (Fisher, The Design of
# Experiments).
MAIZE = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def few_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 199)


def seeded(values):
    return dict(enumerate(values, 1))


def test_the_docstrings_hold():
    assert doctest.testmod(statistics) == (0, 6)


def test_student_s_patients():
    found = compare(seeded(LAEVO), seeded(DEXTRO))
    assert found.n == 10 and found.difference == pytest.approx(1.58) and found.sd == pytest.approx(1.2300, abs=1e-4)
    assert found.t == pytest.approx(4.0621, abs=1e-4)
    assert found.p == pytest.approx(0.002833, abs=1e-6) and found.p_better == pytest.approx(0.001416, abs=1e-6)
    assert found.t_interval == pytest.approx((0.7001, 2.4599), abs=1e-4)
    assert found.d_z == pytest.approx(1.58 / 1.22995, abs=1e-4)
    assert found.g_z == pytest.approx(found.d_z * 0.9139, abs=1e-4)  # Hedges (1981): 0.9139 at 9 degrees of freedom
    assert compare(seeded(LAEVO), seeded(DEXTRO), higher_is_better=False).p_better == pytest.approx(0.998584, abs=1e-6)


def test_darwin_s_maize():
    t, p, above, below = paired_t(MAIZE)
    assert (t, p) == pytest.approx((2.148, 0.0497), abs=1e-4) and above == pytest.approx(p / 2) == 1 - below
    assert signed_rank(MAIZE) == 0.041259765625  # of 2^15 choices of signs


@pytest.mark.parametrize(
    ("values", "p"),
    [
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2 / 64),
        ([1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 2 / 64),  # ties: each mean rank the same
        ([0.0, 0.0, 0.0], 1.0),
        ([0.0, 0.0, 5.0], 1.0),  # one sign: either is as likely
        ([0.0, 1.0, 2.0, 3.0], 2 / 8),
        ([1.0, -2.0, 3.0], 6 / 8),  # sums of ranks 0 1 2 3 3 4 5 6: at least 4 in three of eight, twice
        ([4.0], None),
        ([], None),
    ],
)
def test_signed_ranks_by_hand(values, p):
    assert signed_rank(values) == p


def test_signed_ranks_with_ties_and_zeros_are_counted_out():
    """By going over all choices of signs."""
    values = [0.5, 0.5, -1.0, 2.0, 0.0, 2.0, -2.0, 3.5]
    from scipy.stats import rankdata

    ranks = [rank for rank, value in zip(rankdata(np.abs(values)), values) if value]
    sums = [sum(itertools.compress(ranks, choice)) for choice in itertools.product((0, 1), repeat=len(ranks))]
    seen = sum(rank for rank, value in zip(ranks, filter(None, values)) if value > 0)
    tail = min(sum(each <= seen for each in sums), sum(each >= seen for each in sums))
    assert signed_rank(values) == 2 * tail / len(sums)


def test_signed_ranks_are_scipy_s():
    from scipy.stats import wilcoxon

    generator = np.random.default_rng(1)
    for n in (6, 15, 30):
        values = generator.normal(0.3, 1, n)
        assert signed_rank(values.tolist()) == pytest.approx(wilcoxon(values, method="exact").pvalue, rel=1e-12)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, None, 0.8]) == [1.0, None, 1.0]
    assert holm([]) == [] and holm([None]) == [None]


@pytest.mark.parametrize(("effect", "n"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10), (-0.5, 34), (0.0, None)])
def test_seeds_needed_is_the_textbooks(effect, n):
    """Cohen's small, medium and large effect; G*Power prints the same numbers."""
    assert seeds_needed(effect) == n


def test_seeds_needed_at_the_ends():
    assert seeds_needed(1e12) == 2 and seeds_needed(1e-9) is None
    found = [seeds_needed(effect, alpha=1e-6) for effect in np.geomspace(0.1, 100, 40)]  # SciPy's nct gives NaN here
    assert found == sorted(found, reverse=True) and found[0] > 3000 and found[-1] > 2
    assert seeds_needed(0.003) == pytest.approx((1.959964 + 0.841621) ** 2 / 0.003**2, rel=1e-4)
    assert seeds_needed(0.5, alpha=0.01) == 51 and seeds_needed(0.5, power=0.9) == 44


def test_that_many_seeds_have_that_power():
    n = seeds_needed(0.9)
    samples = np.random.default_rng(2).normal(0.9, 1, (2_000, n))
    found = np.mean([paired_t(row.tolist())[1] < 0.05 for row in samples])
    assert n == 12 and 0.78 < found < 0.86  # of 12 the power is 0.80 and a bit


def test_null_data_is_told_apart_as_often_as_alpha_says():
    samples = np.random.default_rng(3).normal(0, 1, (3_000, 5))
    p = np.array([paired_t(row.tolist())[1:] for row in samples])
    for column in p.T:
        assert [np.mean(column < alpha) for alpha in (0.05, 0.5)] == pytest.approx([0.05, 0.5], abs=0.025)
    assert np.mean(p[:, 0] < 0.05) == pytest.approx(0.05, abs=0.012)


def test_the_whole_pipeline_on_null_data(few_resamples):
    """Of studies in which nothing differs at most alpha say anywhere that something does, and not far fewer."""
    study = dataclasses.replace(plain_study(variants=("BN", "FBN", "GN")), alpha=0.2)
    told, wrongly_out, rounds = 0, 0, 100
    for number in range(rounds):
        found = study_statistics(study, draw(study, number, mean=lambda levels, name: 50.0, iterations=0))["segm/AP"]
        told += any(each.verdict != "not told apart" for each in found.comparisons)
        wrongly_out += "GN" in found.best[0].beaten  # as good as any
    assert 0.05 < told / rounds < 0.27  # in 1,200 rounds 0.16
    assert wrongly_out / rounds < 0.24  # 0.17


def test_a_plain_difference_is_found(few_resamples):
    study = plain_study()
    means = {"BN": 50.0, "FBN, T=3": 53.0, "FBN, T=5": 47.0, "GN": 50.0}
    found = study_statistics(study, draw(study, mean=lambda levels, name: means[name], iterations=0))["segm/AP"]
    assert [each.verdict for each in found.comparisons] == ["higher", "lower", "not told apart"]
    assert not any(each.is_underpowered for each in found.comparisons)
    assert found.best[0].best == "FBN, T=3" and found.best[0].possible == ["FBN, T=3"]
    assert set(found.best[0].beaten) == {"BN", "FBN, T=5", "GN"} and not found.best[0].left_out


def test_of_a_loss_the_lowest_is_best(few_resamples):
    study = dataclasses.replace(plain_study(), metrics={"loss": LOSS})
    means = {"BN": 50.0, "FBN, T=3": 53.0, "FBN, T=5": 47.0, "GN": 50.0}
    found = study_statistics(study, draw(study, mean=lambda levels, name: means[name], iterations=0))["loss"]
    assert [each.verdict for each in found.comparisons][:2] == ["higher", "lower"]
    assert found.comparisons[0].p_better > 0.99 and found.comparisons[1].p_better < 0.01
    assert found.best[0].best == "FBN, T=5" and "FBN, T=3" in found.best[0].beaten


def test_bootstrap_covers_as_its_docstring_says(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 999)
    generator = np.random.default_rng(4)
    for n, coverage in ((5, 0.84), (15, 0.92)):
        ends = [bootstrap_interval(row.tolist()) for row in generator.normal(0, 1, (500, n))]
        assert np.mean([low < 0 < high for low, high in ends]) == pytest.approx(coverage, abs=0.04)


def test_bootstrap_is_scipy_s():
    from scipy.stats import bootstrap

    low, high = bootstrap((np.array(MAIZE),), np.mean, method="BCa", n_resamples=99_999, rng=5).confidence_interval
    assert bootstrap_interval(MAIZE) == pytest.approx((low, high), abs=1.5)
    assert bootstrap_interval(MAIZE) == bootstrap_interval(MAIZE[::-1])


# ---- what cannot be told


@pytest.mark.parametrize("size", [0, 1])
def test_no_pair_or_one_is_no_test(size):
    found = compare(seeded([5.0] * size), seeded([4.0] * 3))
    assert found.n == size and found.note and found.is_underpowered
    assert {found.p, found.p_better, found.p_signed_rank, found.interval, found.seeds_needed} == {None}


def test_two_pairs_are_never_told_apart():
    study = plain_study(seeds=2, variants=("BN", "FBN"))
    outcomes = draw(study, mean=lambda levels, name: 50.0 if name == "BN" else 90.0, sd=1e-6, iterations=0)
    (found,) = study_statistics(study, outcomes)["segm/AP"].comparisons
    assert found.p < 0.05 and found.interval is None and found.verdict == "not told apart" and found.g_z == 0


@pytest.mark.parametrize("step", [0.0, 1.0])
def test_differences_that_are_all_the_same(step):
    """In binary 71.1 - 70.1 and 91.2 - 90.2 are not."""
    baseline = [70.1, 90.2, 33.3, 12.7, 0.1, 50.6]
    found = compare(seeded([each + step for each in baseline]), seeded(baseline))
    assert found.difference == step and found.sd == 0 and found.p is None and found.d_z is None and found.note
    assert found.p_signed_rank == (2 / 64 if step else 1) and found.interval is None


def test_runs_that_failed_diverged_or_are_missing_are_named_and_not_paired(few_resamples):
    study = plain_study(variants=("BN", "FBN"), seeds=8)
    outcomes = draw(study, iterations=0)
    outcomes = changed(outcomes, "BN", 2, state="failed", metrics={}, error="killed")
    outcomes = changed(outcomes, "BN", 3, metrics={"segm/AP": math.nan})
    outcomes = changed(outcomes, "FBN", 4, metrics={"segm/AP": math.inf})
    outcomes = changed(outcomes, "FBN", 5, metrics={"segm/AP": 1e200})
    outcomes = changed(outcomes, "FBN", 6, state="running", metrics={})
    outcomes = [each for each in outcomes if (each.variant, each.seed) != ("BN", 7)]
    found = study_statistics(study, outcomes)["segm/AP"]
    first, second = found.summaries.values()
    assert (first.n, first.failed, first.diverged, first.unfinished) == (5, [2], [3], [7])
    assert (second.n, second.failed, second.diverged, second.unfinished) == (5, [], [4, 5], [6])
    assert found.comparisons[0].seeds == [1, 8] and found.comparisons[0].n == 2
    assert found.best[0].best is None and found.best[0].left_out == ["BN", "FBN"]


def test_holm_s_family_is_every_test_of_a_metric(few_resamples):
    study = product_study(norms=("BN", "FBN", "GN"), batches=("2", "4"), sets=("one",), metrics={"a": TOP1, "b": LOSS})
    outcomes = draw(study, iterations=0)
    for found in study_statistics(study, outcomes).values():
        assert [each.p_holm for each in found.comparisons] == holm([each.p for each in found.comparisons])
        least = min(found.comparisons, key=lambda each: each.p)
        assert least.p_holm == pytest.approx(min(1, 4 * least.p))


def test_a_study_of_nothing():
    study = plain_study()
    found = study_statistics(study, [])["segm/AP"]
    assert {each.n for each in found.summaries.values()} == {0} and {each.n for each in found.comparisons} == {0}
    assert found.summaries["BN"].unfinished == study.seeds and found.best[0].best is None


def test_the_block_is_json_without_nan(few_resamples):
    import json

    study = plain_study(seeds=3)
    block = statistics_block(study, changed(draw(study), "BN", 1, metrics={"segm/AP": math.nan}))
    assert json.loads(json.dumps(block, allow_nan=False))["metrics"]["segm/AP"]["summaries"]["BN"]["diverged"] == [1]
    assert block["seeds_wanted"] == 15 and block["bootstrap"]["method"] == "BCa"


# ---- which variants stand beside each other


def test_sets_of_a_product_share_the_other_factors():
    study = product_study(norms=("BN", "FBN"), batches=("2", "4"), sets=("a", "b"))
    assert compared_factor(study) == "norm"
    sets = compared_sets(study)
    assert list(sets) == ["batch 2, a", "batch 4, a", "batch 2, b", "batch 4, b"]  # as in the names of variants
    assert sets["batch 4, a"] == ["BN, batch 4, data a", "FBN, batch 4, data a"]


def test_the_compared_factor_is_that_of_the_comparisons():
    study = product_study(norms=("BN", "FBN"), batches=("2", "4"), sets=("one",))
    across = [Comparison(f"{norm}, batch 2", f"{norm}, batch 4", norm) for norm in ("BN", "FBN")]
    study = dataclasses.replace(study, comparisons=across)
    assert compared_factor(study) == "batch"
    assert compared_sets(study) == {norm: [f"{norm}, batch 2", f"{norm}, batch 4"] for norm in ("BN", "FBN")}


def test_levels_are_compared_over_all_settings():
    study = product_study(norms=("BN", "FBN", "GN"), batches=("2", "4", "8"), sets=("one",), seeds=8)
    outcomes = draw(study, sd=0.5, mean=lambda levels, name: 50.0 + 0.4 * (levels["norm"] == "FBN"), iterations=1)
    found = study_statistics(study, outcomes)["top1"]
    first, second = found.over_all
    assert (first.variant, first.baseline, first.group) == ("FBN", "BN", "mean over 3 settings")
    assert first.n == 8 and (second.variant, second.baseline) == ("GN", "BN")
    each = {(one.variant, one.seed): one.metrics["top1"] for one in outcomes}
    differences = [
        np.mean([each[f"FBN, batch {batch}", seed] - each[f"BN, batch {batch}", seed] for batch in (2, 4, 8)])
        for seed in range(1, 9)
    ]
    assert first.difference == pytest.approx(np.mean(differences))
    assert first.p == pytest.approx(paired_t(differences)[1])
    assert [first.p_holm, second.p_holm] == holm([first.p, second.p])
    missing = changed(outcomes, "FBN, batch 4", 3, metrics={"top1": math.nan})
    assert study_statistics(study, missing)["top1"].over_all[0].seeds == [1, 2, 4, 5, 6, 7, 8]
    one_setting = product_study(norms=("BN", "FBN"), batches=("2",), sets=("one",))
    assert study_statistics(one_setting, draw(one_setting))["top1"].over_all == []
    assert study_statistics(plain_study(seeds=3), [])["segm/AP"].over_all == []


def test_sets_without_factors_are_the_groups():
    study = plain_study(variants=("BN", "FBN", "GN", "FGN"))
    groups = [Comparison("FBN", "BN", "batch"), Comparison("FGN", "GN", "group")]
    study = dataclasses.replace(study, comparisons=groups, variants=study.variants | {"alone": Variant()})
    assert compared_factor(study) is None
    assert compared_sets(study) == {"batch": ["BN", "FBN"], "group": ["GN", "FGN"]}


# ---- laws

FIGURES = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20)
PAIRS = st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)), min_size=2, max_size=12)
QUICK = settings(max_examples=40, deadline=None)


@QUICK
@given(PAIRS, st.booleans())
def test_swapping_the_two_turns_the_sign(pairs, higher):
    first, second = (seeded(each) for each in zip(*pairs))
    one = compare(first, second, higher_is_better=higher)
    two = compare(second, first, higher_is_better=higher)
    assert one.difference == -two.difference and one.sd == two.sd and one.p == two.p
    assert one.p_signed_rank == two.p_signed_rank and one.seeds_needed == two.seeds_needed
    if one.p is not None:
        assert one.p_better + two.p_better == pytest.approx(1) and one.d_z == -two.d_z
        assert one.t_interval == pytest.approx(tuple(-end for end in reversed(two.t_interval)))
        assert (one.t_interval[0] > 0 or one.t_interval[1] < 0) == (one.p < 0.05) or one.p == pytest.approx(0.05)
    if one.interval is not None:
        assert one.interval == tuple(-end for end in reversed(two.interval)) and one.interval[0] < one.interval[1]


@QUICK
@given(PAIRS, st.randoms(use_true_random=False))
def test_the_order_of_the_seeds_does_not_matter(pairs, random_order: random.Random):
    shuffled = list(pairs)
    random_order.shuffle(shuffled)
    before, after = (compare(*(seeded(each) for each in zip(*order))) for order in (pairs, shuffled))
    assert before == after


@QUICK
@given(FIGURES, st.floats(1e-3, 1e3))
def test_units_do_not_matter(values, unit):
    one, two = paired_t(values), paired_t([unit * value for value in values])
    if one is not None and two is not None and np.std(values) > 1e-6 * np.max(np.abs(values)):
        assert one == pytest.approx(two, rel=1e-6, abs=1e-9)
    summary = summarize(seeded(values))
    assert summary.least <= summary.mean <= summary.greatest or summary.mean == pytest.approx(summary.least)
    assert t_interval(values) is None or t_interval(values)[0] <= summary.mean <= t_interval(values)[1]


@QUICK
@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=12))
def test_holm_is_no_smaller_and_keeps_the_order(p_values):
    adjusted = holm(p_values)
    known = sorted((p, a) for p, a in zip(p_values, adjusted) if p is not None)
    assert [p is None for p in p_values] == [a is None for a in adjusted]
    assert all(p <= a <= 1 for p, a in known) and [a for _, a in known] == sorted(a for _, a in known)


def test_pairs_that_all_say_the_same_are_named_where_the_t_test_does_not_tell_them_apart():
    """As of ten runs of which one failed to learn."""
    baseline = dict.fromkeys(range(10), 98.0)
    variant = {seed: 98.5 + 0.1 * (seed % 3) for seed in baseline} | {3: 185.0}
    found = compare(variant, baseline)
    assert found.p > 0.05 and found.note == "all 10 pairs differ to the same side"
    assert compare(baseline, variant).note == found.note
    assert compare({**variant, 3: 99.0}, baseline).note == ""  # told apart without
    assert compare({**variant, 4: 97.9}, baseline).note == ""
    few = {seed: variant[seed] for seed in range(1, 6)}
    assert compare(few, baseline).p > 0.05 and compare(few, baseline).note == ""
    assert compare(baseline, baseline).note == "in every pair both figures are the same, so there is no t-test"
