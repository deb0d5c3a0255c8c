"""What the figures of a study say: of each variant mean, spread and interval, and of each comparison, seed by seed,
whether the difference can be told from chance. P2 (Davis and Frank, "Revisiting Batch Norm Initialization", 2022)
compares 15 seeds by one-sided paired t-tests at 0.05; the rest is textbook: Wilcoxon's signed ranks with Pratt's zeros,
Holm's step-down procedure, Cohen's d_z, Efron's BCa bootstrap, the power of the t-test, and subset selection by Hsu's
"multiple comparisons with the best", by Bonferroni's inequality.
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.studies.comparing import variant_name
from fbn_plugin.engine.studies.outcomes import Comparison, Outcome, Study
from fbn_plugin.engine.studies.run_figures import FIRST

__all__ = [
    "POWER",
    "RESAMPLES",
    "SEEDS_OF_P2",
    "BestOf",
    "MetricStatistics",
    "PairedComparison",
    "Summary",
    "as_number",
    "bootstrap_interval",
    "compare",
    "compared_factor",
    "compared_sets",
    "figures_of",
    "holm",
    "is_figure",
    "numeric_factor",
    "paired_t",
    "seeds_needed",
    "signed_rank",
    "statistics_block",
    "study_statistics",
    "summarize",
    "t_interval",
]

# P2's number of seeds. A comparison of fewer pairs is labelled underpowered.
SEEDS_OF_P2 = 15
POWER = 0.8
RESAMPLES = 9_999
# So many pairs that differ to one side have a two-sided p below 0.05 in a sign test.
_LEAST_TO_ONE_SIDE = 6
_ALL_ALIKE = "in every pair both figures are the same, so there is no t-test"
# The bootstrap of two values is their range.
_LEAST_FOR_BOOTSTRAP = 3
# Beyond, squares overflow: a run that ends there has diverged.
_LARGEST = 1e100
# Significant digits that differences are rounded to: 91.2 - 90.2 and 71.3 - 70.3 are to be the same.
_DIGITS = 12
_MOST_SEEDS = 1_000_000
# Of an integral over a normal or a chi distribution: points, and how far out.
_POINTS = 2_001
_FAR = 9.0

Interval = tuple[float, float]


@dataclass(frozen=True)
class Summary:
    """One metric of one variant over its seeds.

    Attributes:
        n: runs that ended with a figure; the rest describes these.
        mean, median, least, greatest: None where n is 0.
        sd: sample standard deviation; None where n is below 2.
        interval: of the mean, by the bootstrap; None where n is below 3 or all figures are the same.
        t_interval: of the mean, by the t distribution; None where n is below 2 or all figures are the same.
        failed: seeds of runs that ended with an error.
        diverged: seeds of runs that ended without a finite figure.
        unfinished: seeds of runs that are still to end.
    """

    n: int
    mean: float | None = None
    sd: float | None = None
    median: float | None = None
    least: float | None = None
    greatest: float | None = None
    interval: Interval | None = None
    t_interval: Interval | None = None
    failed: list[int] = field(default_factory=list)
    diverged: list[int] = field(default_factory=list)
    unfinished: list[int] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether every run gave a figure: the mean of those that survived says less than it seems."""
        return self.n > 0 and not (self.failed or self.diverged or self.unfinished)


@dataclass(frozen=True)
class PairedComparison:
    """A variant minus its baseline, over the seeds for which both have a figure.

    What a field cannot say of so few or such pairs is None, never a number.

    Attributes:
        variant, baseline, group: as the study names them.
        n: number of pairs.
        seeds: of the pairs.
        difference, sd: mean and sample standard deviation of the differences.
        interval, t_interval: of the mean difference, at 1 - alpha: BCa bootstrap, and the t-test's own.
        t: the statistic of the paired t-test, of n - 1 degrees of freedom.
        p, p_better: of the two-sided test, and of the one-sided one that the variant is better (P2's).
        p_signed_rank: of Wilcoxon's two-sided test.
        p_holm, p_better_holm, p_signed_rank_holm: the same three, adjusted over all comparisons of the metric that are
            of one kind: those of the study, those over all settings, those with another metric.
        d_z, g_z: Cohen's effect size of pairs, difference / sd, and Hedges' correction of it for small n.
        seeds_needed: for a power of 0.8 in the two-sided test at alpha, if the true effect were ``d_z``.
        verdict: ``"higher"``, ``"lower"`` or ``"not told apart"``.
        is_underpowered: fewer pairs than P2's 15.
        note: why there is no test, or what else is to be known of the pairs; "" where there is nothing.
    """

    variant: str
    baseline: str
    group: str
    n: int
    seeds: list[int]
    difference: float | None = None
    sd: float | None = None
    interval: Interval | None = None
    t_interval: Interval | None = None
    t: float | None = None
    p: float | None = None
    p_better: float | None = None
    p_signed_rank: float | None = None
    p_holm: float | None = None
    p_better_holm: float | None = None
    p_signed_rank_holm: float | None = None
    d_z: float | None = None
    g_z: float | None = None
    seeds_needed: int | None = None
    verdict: str = "not told apart"
    is_underpowered: bool = True
    note: str = ""


@dataclass(frozen=True)
class BestOf:
    """Which of several variants may be the best.

    Attributes:
        context: what they share, such as ``"batch 4"``; "" where it is the whole study.
        best: that of the best mean; None where none has a figure for every seed.
        possible: all that no other beats, in the order of their means, ``best`` first. With the confidence 1 - alpha,
            over all contexts together, the variant that is truly best is among them.
        beaten: the others that were tested.
        left_out: those without a figure for every seed.
        n: number of seeds.
    """

    context: str
    best: str | None
    possible: list[str]
    beaten: list[str]
    left_out: list[str]
    n: int


@dataclass(frozen=True)
class MetricStatistics:
    """All that is computed of one metric.

    Attributes:
        summaries: of each variant.
        comparisons: of the study.
        best: of each set of variants that are compared.
        with_others: of a variant with itself by another metric, which is the baseline's name, as claims have it.
        over_all: of levels of the compared factor, by the mean of each seed's figures over all settings in which the
            study compares the two; none where that is one setting.
    """

    summaries: dict[str, Summary]
    comparisons: list[PairedComparison]
    best: list[BestOf]
    with_others: list[PairedComparison] = field(default_factory=list)
    over_all: list[PairedComparison] = field(default_factory=list)


def study_statistics(study: Study, outcomes: Sequence[Outcome]) -> dict[str, MetricStatistics]:
    """The statistics of a study by metric. The order of the outcomes does not matter, nor does that of the seeds.

    Args:
        study: its metrics, comparisons and alpha.
        outcomes: its jobs; one that is missing counts as unfinished.
    """
    found = {}
    jobs: dict[str, list[Outcome]] = {variant: [] for variant in study.variants}
    for outcome in outcomes:
        jobs[outcome.variant].append(outcome)
    for name, metric in study.metrics.items():
        figures = {variant: figures_of(jobs[variant], variant, name) for variant in study.variants}
        summaries = {
            variant: _with_states(summarize(figures[variant], study.alpha), study, jobs[variant], name)
            for variant in study.variants
        }
        lengths = {variant: _lengths(jobs[variant], name) for variant in study.variants if metric.of in FIRST}
        comparisons = [_compared(study, each, name, figures, lengths) for each in study.comparisons]
        best = _best(study, figures, summaries, metric.higher_is_better) if metric.is_ranked else []
        others = _judged(_with_others(study, name, jobs, figures), study.alpha)
        over_all = [] if metric.of in FIRST else _judged(_over_all(study, name, figures), study.alpha)
        found[name] = MetricStatistics(summaries, _judged(comparisons, study.alpha), best, others, over_all)
    return found


def _over_all(study: Study, name: str, figures: Mapping[str, Mapping[int, float]]) -> list[PairedComparison]:
    """Levels of the compared factor by the mean over settings, of the seeds that have a figure in all of them."""
    factor = compared_factor(study)
    pairs: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for each in study.comparisons if factor else ():
        first, second = (study.variants[one].levels for one in (each.variant, each.baseline))
        if {key for key in first if first[key] != second.get(key)} == {factor}:
            pairs.setdefault((first[factor], second[factor]), []).append((each.variant, each.baseline))
    found = []
    for (level, other), members in pairs.items():
        if len(members) < 2:
            continue
        seeds = set.intersection(*(set(figures[variant]) for pair in members for variant in pair))
        means = [
            {seed: statistics.fmean(figures[pair[i]][seed] for pair in members) for seed in sorted(seeds)}
            for i in (0, 1)
        ]
        compared = compare(
            *means,
            higher_is_better=study.metrics[name].higher_is_better,
            alpha=study.alpha,
            names=(level, other, f"mean over {len(members)} settings"),
        )
        left_out = len(set(study.seeds)) - len(seeds)
        note = f"{counted(left_out, 'seed')} without a figure in some setting left out" if left_out else ""
        found.append(dataclasses.replace(compared, note="; ".join(filter(None, (compared.note, note)))))
    return found


def _with_others(
    study: Study, name: str, jobs: Mapping[str, Sequence[Outcome]], figures: Mapping[str, Mapping[int, float]]
) -> list[PairedComparison]:
    """What the claims hold a metric against that is another one of the same runs. Iterations to a threshold, which a
    run may not pass, are held against nothing."""
    pairs = {
        (claim.variant, claim.than): None
        for claim in study.claims
        if claim.metric == name
        and claim.than in study.metrics
        and claim.variant in study.variants
        and not {study.metrics[name].of, study.metrics[claim.than].of} & set(FIRST)
    }
    return [
        compare(
            figures[variant],
            figures_of(jobs[variant], variant, than),
            higher_is_better=study.metrics[name].higher_is_better,
            alpha=study.alpha,
            names=(variant, than, ""),
        )
        for variant, than in pairs
    ]


def _compared(
    study: Study,
    pair: Comparison,
    name: str,
    figures: Mapping[str, Mapping[int, float]],
    lengths: Mapping[str, Mapping[int, float]],
) -> PairedComparison:
    """A comparison of the study; in one of iterations to a threshold a run that never passed it counts with its whole
    length, unless its partner never did, too."""
    variant, baseline = figures[pair.variant], figures[pair.baseline]
    censored = 0
    if lengths:
        seeds = variant.keys() | baseline.keys()
        whole = [{**lengths[one], **figures[one]} for one in (pair.variant, pair.baseline)]
        variant, baseline = ({seed: each[seed] for seed in seeds if seed in each} for each in whole)
        paired = variant.keys() & baseline.keys()
        censored = sum(seed not in figures[one] for one in (pair.variant, pair.baseline) for seed in paired)
    found = compare(
        variant,
        baseline,
        higher_is_better=study.metrics[name].higher_is_better,
        alpha=study.alpha,
        names=(pair.variant, pair.baseline, pair.group),
    )
    if lengths and not found.n:
        return dataclasses.replace(found, note="no pair of runs has one that got there")
    if not censored:
        return found
    note = f"{counted(censored, 'run')} that never got there {'counts' if censored == 1 else 'count'} with their length"
    return dataclasses.replace(found, note="; ".join(filter(None, (found.note, note))))


def _lengths(outcomes: Sequence[Outcome], metric: str) -> dict[int, float]:
    """Seed -> iterations of the runs that are done, as far as their curves tell."""
    curves = {each.seed: each.curves.get(metric) for each in outcomes if each.state == "done"}
    return {seed: float(curve[-1][0]) for seed, curve in curves.items() if curve}


def statistics_block(study: Study, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """:func:`study_statistics` as JSON has it, with what it was computed by."""
    return {
        "alpha": study.alpha,
        "seeds_wanted": SEEDS_OF_P2,
        "power": POWER,
        "bootstrap": {"method": "BCa", "resamples": RESAMPLES, "level": 1 - study.alpha},
        "adjusted": "Holm, over all comparisons of a metric that are of one kind",
        "metrics": {name: asdict(each) for name, each in study_statistics(study, outcomes).items()},
    }


def figures_of(outcomes: Sequence[Outcome], variant: str, metric: str) -> dict[int, float]:
    """Seed -> final figure of the runs of a variant that are done and have a finite one, in the order of the seeds."""
    found = {
        each.seed: float(each.metrics[metric])
        for each in outcomes
        if each.variant == variant and each.state == "done" and is_figure(each.metrics.get(metric))
    }
    return dict(sorted(found.items()))


def is_figure(value: float | None) -> bool:
    """Whether a run ended with a number that can be computed with."""
    return value is not None and math.isfinite(value) and abs(value) <= _LARGEST


def _with_states(summary: Summary, study: Study, jobs: Sequence[Outcome], metric: str) -> Summary:
    """A variant's summary that says what became of the seeds without a figure."""
    by_seed = {each.seed: each for each in jobs}
    for seed in sorted(set(study.seeds)):
        outcome = by_seed.get(seed)
        if outcome is None or outcome.state in ("running", "waiting"):
            summary.unfinished.append(seed)
        elif outcome.state == "failed":
            summary.failed.append(seed)
        elif not is_figure(outcome.metrics.get(metric)):
            summary.diverged.append(seed)
    return summary


def summarize(figures: Mapping[int, float], alpha: float = 0.05) -> Summary:
    """Mean and spread of one variant's figures.

    Args:
        figures: seed -> figure.
        alpha: the intervals are at 1 - alpha.

    Examples::

        >>> summarize({1: 1.0, 2: 2.0, 3: 6.0}).mean
        3.0
    """
    values = sorted(figures.values())
    if not values:
        return Summary(0)
    return Summary(
        n=len(values),
        mean=statistics.fmean(values),
        sd=_sd(values),
        median=statistics.median(values),
        least=values[0],
        greatest=values[-1],
        interval=bootstrap_interval(values, 1 - alpha),
        t_interval=t_interval(values, 1 - alpha),
    )


def compare(
    variant: Mapping[int, float],
    baseline: Mapping[int, float],
    *,
    higher_is_better: bool = True,
    alpha: float = 0.05,
    names: tuple[str, str, str] = ("", "", ""),
) -> PairedComparison:
    """A variant minus its baseline, paired by seed, not yet adjusted nor judged.

    Args:
        variant, baseline: seed -> figure; seeds that only one of them has are left out.
        higher_is_better: of the metric, for the one-sided test.
        alpha: of the test that ``seeds_needed`` is for; the intervals are at 1 - alpha.
        names: of variant, baseline and group.
    """
    seeds = sorted(variant.keys() & baseline.keys())
    known = {"variant": names[0], "baseline": names[1], "group": names[2], "n": len(seeds), "seeds": seeds}
    known["is_underpowered"] = len(seeds) < SEEDS_OF_P2
    if not seeds:
        return PairedComparison(**known, note="no seed has a figure of both")
    differences = _differences([variant[seed] for seed in seeds], [baseline[seed] for seed in seeds])
    known |= {"difference": statistics.fmean(differences), "sd": _sd(differences)}
    if len(seeds) == 1:
        return PairedComparison(**known, note="one pair tells nothing of chance")
    known["p_signed_rank"] = signed_rank(differences)
    test = paired_t(differences)
    if test is None:
        note = "every difference is the same, so there is no t-test" if any(differences) else _ALL_ALIKE
        return PairedComparison(**known, note=note)
    t, p, p_greater, p_less = test
    effect = known["difference"] / known["sd"]
    return PairedComparison(
        **known,
        interval=bootstrap_interval(differences, 1 - alpha),
        t_interval=t_interval(differences, 1 - alpha),
        t=t,
        p=p,
        p_better=p_greater if higher_is_better else p_less,
        d_z=effect,
        g_z=effect * _hedges_correction(len(seeds) - 1),
        seeds_needed=seeds_needed(effect, alpha),
        note=_all_to_one_side(differences) if p >= alpha else "",
    )


def _all_to_one_side(differences: Sequence[float]) -> str:
    """That all pairs say the same, where this is more than chance (sign test at 0.05) and one, such as with a run that
    failed to learn, is so far from the others that the t-test does not see it; else ""."""
    if len(differences) < _LEAST_TO_ONE_SIDE or not (max(differences) < 0 or min(differences) > 0):
        return ""
    return f"all {len(differences)} pairs differ to the same side"


def _differences(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """First minus second, rounded to 12 significant digits of the figures, so that rounding errors break no ties."""
    largest = max(map(abs, (*first, *second)))
    digits = _DIGITS - math.ceil(math.log10(largest)) if largest else 0
    return [round(a - b, digits) + 0.0 for a, b in zip(first, second)]


def _scaled(values: Sequence[float]) -> tuple[list[float], float]:
    """Sorted values of a magnitude of at most 1, whose squares do not vanish, and what they were divided by."""
    scale = max(map(abs, values)) or 1.0
    return [value / scale for value in sorted(values)], scale


def _sd(values: Sequence[float]) -> float | None:
    """Sample standard deviation, 0 where all values are the same; None of one value."""
    if len(values) < 2:
        return None
    scaled, scale = _scaled(values)
    return scale * math.sqrt(statistics.variance(scaled))


def _has_spread(values: Sequence[float], least: int = 2) -> bool:
    """Whether there are enough values, and not all the same."""
    return len(values) >= max(least, 2) and _sd(values) > 0


def paired_t(differences: Sequence[float]) -> tuple[float, float, float, float] | None:
    """Student's t-test of a mean of 0: t, and p two-sided, one-sided for a mean above 0, and below 0; None of fewer
    than two differences, and where all are the same.

    Examples::

        >>> [round(each, 4) for each in paired_t([1.0, 2.0, 3.0])]
        [3.4641, 0.0742, 0.0371, 0.9629]
    """
    if not _has_spread(differences):
        return None
    from scipy import stats

    n = len(differences)
    t = statistics.fmean(differences) / _sd(differences) * math.sqrt(n)
    above, below = float(stats.t.sf(t, n - 1)), float(stats.t.cdf(t, n - 1))
    return t, min(1.0, 2 * min(above, below)), above, below


def signed_rank(differences: Sequence[float]) -> float | None:
    """p of Wilcoxon's two-sided signed-rank test; None of fewer than two differences.

    The distribution under the null, every difference as likely with the other sign, is exact for any number of
    differences and any ties, by counting the sums of ranks. Zeros are ranked, and then left out of the sums (Pratt), so
    that p is 1 where all are 0. Of n differences p is at least 2 / 2^n: no fewer than six can get below 0.05.

    Examples::

        >>> signed_rank([1.0, 2.0, 3.0, 4.0, 5.0])
        0.0625
    """
    if len(differences) < 2:
        return None
    from scipy import stats

    ranks = np.rint(2 * stats.rankdata(np.abs(differences))).astype(int)  # mean ranks of ties are whole or half
    signs = np.sign(differences)
    positive, all_ranks = int(ranks[signs > 0].sum()), ranks[signs != 0]
    chances = np.zeros(int(all_ranks.sum()) + 1)
    chances[0] = 1.0
    for rank in all_ranks:
        chances = (chances + np.concatenate([np.zeros(rank), chances[:-rank]])) / 2
    return min(1.0, 2 * float(min(chances[: positive + 1].sum(), chances[positive:].sum())))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p adjusted by Holm's step-down procedure over a family; None stays None, and does not count.

    Examples::

        >>> holm([0.01, 0.04, None, 0.03])
        [0.03, 0.06, None, 0.06]
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    least = 0.0
    for position, (p, i) in enumerate(order):
        least = max(least, min(1.0, p * (len(order) - position)))
        adjusted[i] = least
    return adjusted


def bootstrap_interval(values: Sequence[float], level: float = 0.95) -> Interval | None:
    """Interval of the mean by the BCa bootstrap, of 9,999 resamples of a fixed seed; None of fewer than three values,
    and where all are the same.

    The interval of the values with other signs is the same one with other signs, and their order does not matter. Of
    five values of a normal distribution an interval at 0.95 holds the true mean in about 84 of 100 cases, of 15 in 92:
    it is too short for few seeds, and no verdict rests on it alone.
    """
    if not _has_spread(values, _LEAST_FOR_BOOTSTRAP):
        return None
    from scipy import stats

    scaled, scale = _scaled(values)
    mirrored = [-value for value in reversed(scaled)]
    sign = -1 if mirrored > scaled else 1  # one of the two mirror images is resampled for both
    found = stats.bootstrap(
        (mirrored if sign < 0 else scaled,),
        np.mean,
        confidence_level=level,
        n_resamples=RESAMPLES,
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    low, high = sorted(sign * scale * float(end) for end in found)
    return low, high


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval | None:
    """Interval of the mean by the t distribution: it leaves out 0 where the two-sided t-test's p is below 1 - level.
    None of fewer than two values, and where all are the same.

    Examples::

        >>> [round(end, 3) for end in t_interval([1.0, 2.0, 3.0])]
        [-0.484, 4.484]
    """
    if not _has_spread(values):
        return None
    from scipy import stats

    mean, n = statistics.fmean(values), len(values)
    half = float(stats.t.isf((1 - level) / 2, n - 1)) * _sd(values) / math.sqrt(n)
    return mean - half, mean + half


def seeds_needed(effect: float, alpha: float = 0.05, power: float = POWER) -> int | None:
    """The least number of pairs with which the two-sided paired t-test at alpha has the power; None for an effect of 0,
    and where it is beyond a million.

    Args:
        effect: true mean of the differences over their standard deviation, Cohen's d_z.

    Examples::

        >>> seeds_needed(0.5), seeds_needed(-1.0)
        (34, 10)
    """
    low, high = 1, 2  # the power grows with the number
    while _power(effect, high, alpha) < power:
        if not effect or high > _MOST_SEEDS:
            return None
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _power(effect, middle, alpha) >= power else (middle, high)
    return high if high <= _MOST_SEEDS else None


def _power(effect: float, n: int, alpha: float) -> float:
    """Power of the two-sided paired t-test, by integration. SciPy's noncentral t gives NaN or 0 for large effects and
    small alpha.

    The statistic is (z + shift) / s with a normal z and, of n - 1 degrees of freedom, s**2 as chi**2 / (n - 1). The
    integral is over whichever of the two varies less against the other's step at the critical value.
    """
    from scipy import special, stats

    degrees = n - 1
    critical, shift = float(stats.t.isf(alpha / 2, degrees)), min(abs(effect), 1e4) * math.sqrt(n)
    if math.sqrt(2 * degrees) < critical:
        z = np.linspace(-_FAR, _FAR, _POINTS)
        weights, beyond = stats.norm.pdf(z), special.gammainc(degrees / 2, degrees / 2 * ((z + shift) / critical) ** 2)
    else:
        chi = np.linspace(max(0.0, math.sqrt(degrees) - _FAR), math.sqrt(degrees) + _FAR, _POINTS)
        threshold = critical * chi / math.sqrt(degrees)
        weights = stats.chi.pdf(chi, degrees)
        beyond = special.ndtr(shift - threshold) + special.ndtr(-shift - threshold)
    return float(weights @ beyond / weights.sum())


def _hedges_correction(degrees: int) -> float:
    """The factor that makes Cohen's d unbiased; 0 for one degree of freedom, where no factor does."""
    if degrees < 2:
        return 0.0
    return math.exp(math.lgamma(degrees / 2) - math.lgamma((degrees - 1) / 2)) / math.sqrt(degrees / 2)


def _judged(comparisons: Sequence[PairedComparison], alpha: float) -> list[PairedComparison]:
    """Comparisons of one family with adjusted p and verdict."""
    kinds = ("p", "p_better", "p_signed_rank")
    adjusted = {f"{kind}_holm": holm([getattr(each, kind) for each in comparisons]) for kind in kinds}
    judged = []
    for i, each in enumerate(comparisons):
        found = {kind: values[i] for kind, values in adjusted.items()}
        judged.append(PairedComparison(**(vars(each) | found | {"verdict": _verdict(each, found["p_holm"], alpha)})))
    return judged


def _verdict(comparison: PairedComparison, p_holm: float | None, alpha: float) -> str:
    """The adjusted test and the interval have to agree."""
    if p_holm is None or p_holm >= alpha or comparison.interval is None:
        return "not told apart"
    low, high = comparison.interval
    return "higher" if low > 0 else "lower" if high < 0 else "not told apart"


def compared_factor(study: Study) -> str | None:
    """The factor whose levels are compared: the one in which the variants of most comparisons differ, else the first;
    None where the study has no factors.
    """
    votes = dict.fromkeys(study.factors, 0)
    for each in study.comparisons:
        first, second = study.variants[each.variant].levels, study.variants[each.baseline].levels
        for factor in votes:
            votes[factor] += first.get(factor) != second.get(factor)
    return max(votes, key=votes.__getitem__, default=None)


def compared_sets(study: Study) -> dict[str, list[str]]:
    """Variants that differ in the compared factor alone, by what they share, such as ``"batch 4"``; without factors
    those that stand in one group of comparisons."""
    sets: dict[str, list[str]] = {}
    factor = compared_factor(study)
    if factor is None:
        for each in study.comparisons:
            members = sets.setdefault(each.group, [])
            members += [name for name in (each.baseline, each.variant) if name not in members]
        return sets
    number = numeric_factor(study)
    others = [each for each in study.factors if each != factor]
    slowest = sorted(others, key=lambda each: each == number)  # that one last, so that its levels stand in a row
    for levels in itertools.product(*(study.factors[each] for each in slowest)):
        shared = dict(zip(slowest, levels))
        members = [
            name
            for name, variant in study.variants.items()
            if variant.levels and all(variant.levels.get(key) == level for key, level in shared.items())
        ]
        if members:
            sets[variant_name({key: shared[key] for key in others})] = members
    return sets


def numeric_factor(study: Study) -> str | None:
    """The first factor, but for the compared one, whose levels are at least two different numbers."""
    for factor, levels in study.factors.items():
        numbers = {as_number(level) for level in levels}
        if factor != compared_factor(study) and None not in numbers and len(numbers) == len(levels) > 1:
            return factor
    return None


def as_number(level: str) -> float | None:
    """A level as a finite number; None where it is none."""
    try:
        number = float(level)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _best(
    study: Study,
    figures: Mapping[str, Mapping[int, float]],
    summaries: Mapping[str, Summary],
    higher_is_better: bool,
) -> list[BestOf]:
    """Of each set of variants those that may be the best.

    A variant is out where some other is better by the one-sided paired t-test, at alpha over the number of others and
    of sets: the truly best one is wrongly out, in any of the sets, with a chance of at most alpha, although the best by
    its mean was chosen by looking.
    """
    sets = compared_sets(study)
    found = []
    for context, members in sets.items():
        complete = [name for name in members if summaries[name].is_complete]
        complete.sort(key=lambda name: summaries[name].mean, reverse=higher_is_better)
        level = study.alpha / max(len(sets) * (len(complete) - 1), 1)
        possible = [
            name
            for name in complete
            if not any(_is_better(figures[other], figures[name], higher_is_better, level) for other in complete)
        ]
        found.append(
            BestOf(
                context=context,
                best=complete[0] if complete else None,
                possible=possible,
                beaten=[name for name in complete if name not in possible],
                left_out=[name for name in members if name not in complete],
                n=len(set(study.seeds)),
            )
        )
    return found


def _is_better(first: Mapping[int, float], second: Mapping[int, float], higher_is_better: bool, level: float) -> bool:
    """Whether the first is better than the second, with figures of the same seeds, by the one-sided paired t-test."""
    test = paired_t(_differences([first[seed] for seed in second], list(second.values())))
    return test is not None and test[2 if higher_is_better else 3] < level
