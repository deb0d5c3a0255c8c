"""What a paper claims: how a study file says it, and the verdict that figures give."""

import dataclasses
import math

import pytest
from small_studies import ROOT, write_study
from synthetic_study import changed, draw, plain_study

pytest.importorskip("scipy", reason="scipy is not installed")
from fbn_plugin.engine.studies import statistics
from fbn_plugin.engine.studies.claim_findings import claim_blocks, printed_blocks
from fbn_plugin.engine.studies.claims import ABOUT_PAIRS, KINDS, check_claims, joint_verdict
from fbn_plugin.engine.studies.document import markdown
from fbn_plugin.engine.studies.outcomes import (
    Claim,
    Comparison,
    Metric,
    Outcome,
    Printed,
    read_outcomes,
    write_outcomes,
)
from fbn_plugin.engine.studies.report import report_markdown, write_report
from fbn_plugin.engine.studies.statistics import study_statistics
from fbn_plugin.engine.studies.study_file import read_study

AP = "segm/AP"
MEANS = {"BN": 60.0, "FBN, T=3": 62.0, "FBN, T=5": 60.05, "GN": 58.0}


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 199)


def study_of(*claims: Claim, scale="paper", seeds=10, **changes):
    return dataclasses.replace(plain_study(seeds=seeds), claims=list(claims), scale=scale, id="P0.tab1", **changes)


def outcomes_of(study, sd=0.3):
    return draw(study, sd=sd, mean=lambda levels, name: MEANS[name], iterations=1)


def verdict(claim, sd=0.3, **changes):
    study = study_of(claim, **changes)
    return check_claims(study, study_statistics(study, outcomes_of(study, sd)))[0]


@pytest.mark.parametrize(
    ("claim", "expected"),
    [
        (Claim("higher", AP, "FBN, T=3", "BN"), "reproduced"),
        (Claim("lower", AP, "FBN, T=3", "BN"), "not reproduced"),
        (Claim("lower", AP, "BN", "FBN, T=3"), "reproduced"),  # the comparison is the other way round
        (Claim("higher", AP, "BN", "FBN, T=3"), "not reproduced"),
        (Claim("alike", AP, "FBN, T=5", "BN", 1.0), "reproduced"),
        (Claim("alike", AP, "FBN, T=3", "BN", 1.0), "not reproduced"),
        (Claim("alike", AP, "BN", "GN", 0.5), "not reproduced"),
        (Claim("at_least", AP, "BN", value=55.0), "reproduced"),
        (Claim("at_least", AP, "BN", value=65.0), "not reproduced"),
        (Claim("at_most", AP, "BN", value=65.0), "reproduced"),
        (Claim("printed", AP, "BN", value=60.0), "reproduced"),
        (Claim("printed", AP, "BN", value=61.0), "not reproduced"),
    ],
)
def test_claims_that_the_seeds_tell(claim, expected):
    found = verdict(claim)
    assert found.verdict == expected and found.n == 10 and 0 <= found.p <= 1 and found.why == ""
    assert (found.p < 0.05) != (claim.kind == "printed" and expected == "reproduced")
    if claim.kind in ABOUT_PAIRS:
        assert found.seen == pytest.approx(MEANS[claim.variant] - MEANS[claim.baseline], abs=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_seeds_do_not_tell_is_inconclusive_with_the_seeds_needed(kind):
    baseline, value = ("GN", 2.5) if kind in ABOUT_PAIRS else ("", 60.5)
    found = verdict(Claim(kind, AP, "BN", baseline, value), sd=15.0)
    if kind == "printed":
        assert found.verdict == "reproduced"  # a wide interval holds much
        return
    assert (found.verdict, found.n) == ("inconclusive", 10) and found.p > 0.05 and found.why == ""
    assert found.seeds_needed is None or found.seeds_needed > 10


def test_what_was_not_run_and_why():
    pair = Claim("higher", AP, "FBN, T=3", "BN")
    assert verdict(dataclasses.replace(pair, metric="top1")).why == "this scale does not measure top1"
    assert verdict(dataclasses.replace(pair, variant="IN")).why == "this scale has no IN"
    of_levels = dataclasses.replace(
        study_of(pair), factors={"norm": ["BN"]}, claims=[dataclasses.replace(pair, variant="IN")]
    )
    of_levels = dataclasses.replace(
        of_levels, variants={f"{each}, batch 2": one for each, one in of_levels.variants.items()}
    )
    assert check_claims(of_levels, {AP: None})[0].why == "this scale has no IN"  # and BN is a level that it has
    printed = verdict(Claim("printed", AP, "BN", value=60.0), scale="cpu")
    assert (printed.verdict, printed.why) == ("not run", "only the paper's scale can tell")
    study = study_of(pair)
    outcomes = changed(outcomes_of(study), "BN", 3, state="waiting")
    found = check_claims(study, study_statistics(study, outcomes))[0]
    assert (found.verdict, found.why) == ("not run", "1 of its 20 jobs are still to end")
    study = dataclasses.replace(study, comparisons=[])
    assert check_claims(study, study_statistics(study, outcomes_of(study)))[0].verdict == "not run"


def test_few_and_equal_figures():
    assert verdict(Claim("higher", AP, "GN", "BN"), seeds=1).why == "one pair tells nothing of chance"
    assert verdict(Claim("at_least", AP, "GN", value=1.0), seeds=1).why == "one run tells nothing of chance"
    same = verdict(Claim("at_least", AP, "GN", value=58.0), sd=0.0, seeds=2)
    assert (same.verdict, same.p, same.why) == ("reproduced", None, "every run gave the same figure")
    assert verdict(Claim("at_most", AP, "GN", value=57.0), sd=0.0, seeds=2).verdict == "not reproduced"
    alike = verdict(Claim("alike", AP, "GN", "BN", 1.0), sd=0.0, seeds=2)
    assert alike.verdict == "not reproduced" and "every difference is the same" in alike.why
    assert verdict(Claim("alike", AP, "GN", "BN", 2.0), sd=0.0, seeds=2).verdict == "reproduced"
    assert verdict(Claim("alike", AP, "GN", "BN", 2.0), sd=0.0, seeds=1).verdict == "inconclusive"


def test_claims_of_one_kind_are_adjusted_together():
    one = Claim("alike", AP, "FBN, T=5", "BN", 0.35)
    alone = verdict(one)
    study = study_of(one, *(Claim("alike", AP, name, "BN", 0.3) for name in ("FBN, T=3", "GN")))
    together = check_claims(study, study_statistics(study, outcomes_of(study)))[0]
    assert alone.p < together.p == pytest.approx(3 * alone.p)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["reproduced", "not run"], "reproduced"),
        (["reproduced", "inconclusive"], "inconclusive"),
        (["inconclusive", "not reproduced"], "not reproduced"),
        (["not run"], "not run"),
        ([], "not run"),
    ],
)
def test_the_verdict_of_an_experiment(given, expected):
    found = verdict(Claim("higher", AP, "GN", "BN"))
    assert joint_verdict([dataclasses.replace(found, verdict=each) for each in given]) == expected


def test_the_report_says_so(tmp_path):
    claims = [
        Claim("higher", AP, "FBN, T=3", "BN", text="Filtering helps."),
        Claim("alike", AP, "FBN, T=5", "BN", 0.5),
        Claim("printed", AP, "BN", value=60.0),
        Claim("at_least", AP, "IN", value=3.0),
    ]
    study = study_of(*claims, scale="cpu", printed={AP: {"BN": Printed(60.0, 0.25), "IN": Printed(1.0)}})
    found = study_statistics(study, outcomes := outcomes_of(study))
    text = markdown(claim_blocks(study, found, 2))
    assert "**Reproduced**, at a reduced scale. Of 4 claims: 2 reproduced, 2 not run." in text
    assert "Filtering helps (FBN, T=3: higher mask AP than BN)" in text
    assert "FBN, T=5 and BN: alike in mask AP, to within ±0.5 points" in text
    assert "not run: only the paper's scale can tell" in text and "not run: this scale has no IN" in text
    table = markdown(printed_blocks(study, AP, found[AP]))
    assert "60 ± 0.25" in table and "here at a reduced one" in table and "IN" not in table
    report = report_markdown(study, outcomes)
    assert text.partition("\n\n")[2] in report and table in report and "(cpu scale, reduced)" in report

    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    write_report(study, outcomes, tmp_path)
    assert read_outcomes(tmp_path / "study.json")[0] == study
    assert '"verdict": "reproduced"' in (tmp_path / "study.json").read_text()


def test_runs_that_never_got_there_count_with_their_length(tmp_path):
    steps = Metric(False, "", "steps", AP, "first_at_least", 50.0)
    study = study_of(Claim("lower", "steps", "GN", "BN"), seeds=4, metrics={"steps": steps})
    figures = {"GN": [100, 200, math.nan, 100], "BN": [400, math.nan, math.nan, 300]}
    outcomes = [
        Outcome(name, seed, seed, "done", metrics={"steps": value}, curves={"steps": [(100, 1.0), (500, 2.0)]})
        for name, values in figures.items()
        for seed, value in enumerate(values, 1)
    ]
    found = study_statistics(study, outcomes)["steps"]
    comparison = next(each for each in found.comparisons if each.variant == "GN")
    assert (comparison.seeds, comparison.difference) == ([1, 2, 4], -(300 + 300 + 200) / 3)
    assert comparison.note == "1 run that never got there counts with their length"
    assert found.summaries["BN"].n == 2 and found.summaries["BN"].diverged == [2, 3]
    text = report_markdown(study, outcomes)
    assert "2 never got there" in text and "Runs without a figure" not in text
    write_outcomes(tmp_path / "a.json", study, outcomes, is_packed=True)
    assert report_markdown(*read_outcomes(tmp_path / "a.json")) == text


FILE = """VARIANTS: {a: {MODEL.NORM: FBN}, b: {MODEL.NORM: BN}, c: {MODEL.NORM: IN}}
SEEDS: 1-2
PRINTED: {top1: {a: 84, b: {value: 82, sd: 0.5}}}
COMPARE: [[b, a]]
"""


def read(tmp_path, claims, scale=None, text=FILE):
    return read_study(write_study(tmp_path, f"{text}CLAIMS: {claims}\n"), ROOT, scale=scale).study


def test_claims_of_a_file(tmp_path):
    claims = """
  - {variant: a, baseline: b, is: higher, text: "In  words."}
  - {baseline: b, is: alike, margin: 1, metric: top1}
  - {variant: [a, b], is: printed}
  - {variant: c, is: at_least, value: 3}"""
    study = read(tmp_path, claims)
    assert study.claims == [
        Claim("higher", "top1", "a", "b", text="In words."),
        Claim("alike", "top1", "a", "b", 1.0),
        Claim("alike", "top1", "c", "b", 1.0),
        Claim("printed", "top1", "a", value=84.0),
        Claim("printed", "top1", "b", value=82.0),
        Claim("at_least", "top1", "c", value=3.0),
    ]
    assert study.comparisons == [Comparison("b", "a"), Comparison("c", "b")]  # what COMPARE has not
    assert study.printed == {"top1": {"a": Printed(84.0), "b": Printed(82.0, 0.5)}}


def test_a_metric_is_held_against_another_one_of_the_same_runs(tmp_path):
    text = FILE.replace("SEEDS: 1-2", "SEEDS: 1-6\nMETRICS: [top1, top5, loss]")
    claims = """
  - {variant: [a, b], is: lower, than: top5, text: Of course}
  - {variant: a, is: alike, than: top5, margin: 1}
  - {variant: a, is: higher, metric: loss, than: top5}"""
    study = read(tmp_path, claims, text=text)
    assert study.claims[:2] == [Claim("lower", "top1", name, text="Of course", than="top5") for name in "ab"]
    assert study.comparisons == [Comparison("b", "a")]
    figures = {"a": (70.0, 90.0), "b": (90.0, 90.0)}
    outcomes = [
        Outcome(
            name, seed, seed, "done", metrics={"top1": top1 + seed % 3, "top5": top5 + seed % 2, "loss": 1.0 + seed}
        )
        for name, (top1, top5) in figures.items()
        for seed in range(1, 7)
    ]
    study = dataclasses.replace(study, variants={name: study.variants[name] for name in figures})
    found = study_statistics(study, outcomes)
    verdicts = check_claims(study, found)
    assert [each.verdict for each in verdicts] == ["reproduced", "inconclusive", "not reproduced", "not reproduced"]
    assert verdicts[0].n == 6 and verdicts[0].seen == pytest.approx(-19.5)
    assert [len(found[name].with_others) for name in study.metrics] == [2, 0, 1]
    text = markdown(claim_blocks(study, found, 2))
    assert "Of course (a: lower top-1 accuracy than top-5 accuracy)" in text
    scale = dataclasses.replace(study, metrics={"top1": study.metrics["top1"]})
    assert check_claims(scale, study_statistics(scale, outcomes))[0].why == "this scale does not measure top5"


def test_a_claim_where_the_paper_prints_it_so(tmp_path):
    text = """FACTORS:
  norm: {BN: {MODEL.NORM: BN}, FBN: {MODEL.NORM: FBN}, GN: {MODEL.NORM: GN}}
  batch: {"8": {SOLVER.IMS_PER_BATCH: 8}, "16": {SOLVER.IMS_PER_BATCH: 16}}
SEEDS: 1-2
PRINTED: {top1: {"BN, batch 8": 1, "FBN, batch 8": 2, "BN, batch 16": 5, "FBN, batch 16": 4, "GN, batch 8": 3}}
"""
    for kind, batch in (("higher", 8), ("lower", 16)):
        claims = f"[{{factor: norm, variant: FBN, baseline: BN, is: {kind}, where: printed}}]"
        study = read(tmp_path, claims, text=text)
        assert study.claims == [Claim(kind, "top1", f"FBN, batch {batch}", f"BN, batch {batch}")]
    claims = "[{factor: norm, variant: GN, baseline: BN, is: higher, where: printed}]"
    assert [each.variant for each in read(tmp_path, claims, text=text).claims] == ["GN, batch 8"]
    with pytest.raises(ValueError, match="claim 1 is of what is printed so, and PRINTED has nothing of 'top1'"):
        read(
            tmp_path,
            claims,
            text=text.replace("PRINTED: {top1", "PRINTED: {loss").replace("SEEDS", "METRICS: [top1, loss]\nSEEDS"),
        )


def test_claims_by_a_factor_and_at_a_scale_without_some_levels(tmp_path):
    text = """FACTORS:
  norm: {BN: {MODEL.NORM: BN}, FBN: {MODEL.NORM: FBN}}
  batch: {"8": {SOLVER.IMS_PER_BATCH: 8}, "16": {SOLVER.IMS_PER_BATCH: 16}}
SEEDS: 1-2
SCALES: {paper: {}, cpu: {ONLY: {batch: ["8"]}}, smoke: {VARIANTS: {x: {}, y: {MODEL.NORM: GN}}}}
"""
    claims = "[{factor: norm, variant: FBN, baseline: BN, is: higher}]"
    expected = [Claim("higher", "top1", f"FBN, batch {n}", f"BN, batch {n}") for n in (8, 16)]
    study = read(tmp_path, claims, "cpu", text)
    assert study.claims == expected and study.comparisons == [Comparison("FBN, batch 8", "BN, batch 8")]
    study = read(tmp_path, claims, "smoke", text)
    assert study.claims == [Claim("higher", "top1", "FBN", "BN")] and study.comparisons == []


@pytest.mark.parametrize(
    ("claims", "sentence"),
    [
        ("{}", "CLAIMS must be a list, got {}"),
        ("[a]", "claim 1 must be a mapping such as {variant: FBN"),
        ("[{variant: a, baseline: b}]", "'is' of claim 1 names None, which is none of higher, lower, alike"),
        ("[{variant: a, baseline: b, is: highr}]", "names 'highr', which is none of higher, lower, alike, at_least, "),
        ("[{variant: d, baseline: b, is: higher}]", "claim 1 names 'd', which is none of a, b, c"),
        ("[{variant: a, baseline: a, is: higher}]", "claim 1 compares 'a' with itself"),
        ("[{variant: a, is: higher}]", "claim 1 is that something is higher, and has no baseline"),
        ("[{variant: a, baseline: b, is: alike}]", "claim 1 is that something is alike, and has no margin"),
        ("[{variant: a, baseline: b, than: top1, is: higher}]", "is higher, where baseline has no meaning"),
        ("[{variant: a, than: top1, is: higher}]", "claim 1 compares 'top1' with itself"),
        ("[{variant: a, than: top2, is: higher}]", "than of claim 1 names 'top2', which is none of top1"),
        ("[{variant: a, than: top1, value: 1, is: at_least}]", "is at_least, where than has no meaning"),
        ("[{variant: a, baseline: b, is: higher, where: x}]", "where of claim 1 must be 'printed', got 'x'"),
        ("[{variant: a, baseline: b, is: alike, margin: 1, where: printed}]", "is alike, where where has no meaning"),
        ("[{variant: a, baseline: b, is: alike, margin: 0}]", "margin of claim 1 must be above 0, got 0"),
        ("[{variant: a, baseline: b, is: higher, margin: 1}]", "is higher, where margin has no meaning"),
        ("[{variant: c, is: printed}]", "claim 1: PRINTED has no 'top1' of 'c'"),
        ("[{variant: a, is: at_least}]", "claim 1 is that something is at_least, and has no value"),
        ("[{variant: a, is: at_least, value: x}]", "value of claim 1 must be of type float, got 'x'"),
        ("[{variant: a, baseline: b, is: higher, metric: top5}]", "claim 1 names 'top5', which is none of top1"),
        (
            "[{factor: norm, variant: a, baseline: b, is: higher}]",
            "factor of claim 1 names 'norm', and the study has none",
        ),
        ("[{varient: a, is: printed}]", "unknown key of claim 1 'varient'; did you mean 'variant'?"),
        ("[]\nPRINTED: {top2: {a: 1}}", "PRINTED names 'top2', which is none of top1"),
        ("[]\nPRINTED: {top1: {d: 1}}", "PRINTED of 'top1' names 'd', which is none of a, b, c"),
        ("[]\nPRINTED: {top1: {a: high}}", "PRINTED of 'top1' and 'a' must be a number, got 'high'"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(tmp_path, claims, sentence):
    text = (
        FILE
        if "PRINTED" not in claims
        else "".join(line for line in FILE.splitlines(keepends=True) if not line.startswith("PRINTED"))
    )
    with pytest.raises(ValueError) as error:
        read(tmp_path, claims, text=text)
    assert sentence in str(error.value)


@pytest.mark.parametrize(("name", "title"), [("P0.tab1", "What the paper claims"), ("X.where", "What was expected")])
def test_what_no_paper_claims_is_not_called_so(name, title):
    study = dataclasses.replace(study_of(Claim("alike", AP, "FBN, T=5", "BN", 1.0)), id=name)
    assert f"# {title}\n" in report_markdown(study, outcomes_of(study))


@pytest.mark.parametrize(("epochs", "verdict"), [(0, "not reproduced"), (1, "inconclusive")])
def test_a_number_of_what_is_not_trained_needs_one_run(epochs, verdict):
    study = study_of(Claim("at_least", AP, "BN", value=61.0), Claim("at_most", AP, "BN", value=61.0), seeds=1)
    study = dataclasses.replace(study, settings={"SOLVER.MAX_EPOCH": epochs})
    first, second = check_claims(study, study_statistics(study, outcomes_of(study)))
    assert first.verdict == verdict and (second.verdict == "reproduced") == (epochs == 0)
    why = "one run tells nothing of chance" if epochs else "nothing is trained, and there is no chance in it"
    assert first.why == second.why == why
