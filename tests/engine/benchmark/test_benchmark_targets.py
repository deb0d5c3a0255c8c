"""How results compare to their targets, and how that is told."""

import pytest

from fbn_plugin.engine.benchmark import load, markdown
from fbn_plugin.engine.benchmark.runner import FORMAT, KINDS
from fbn_plugin.engine.benchmark.targets import TARGETS, Target, judge, target_table

FIRST = TARGETS[0]  # two steps, float32 NCHW, <= 0.95


def results(device="cuda", quick=False, **kinds):
    rows = {kind: [] for kind in KINDS} | kinds
    return {"format": FORMAT, "environment": {}, "settings": {"device": device, "quick": quick}, "notes": [], **rows}


def step(ratio, model="resnet50", batch=64, dtype="float32", layout="contiguous", fused=None, peak=1.0):
    def peer(value, to="BN"):
        return {"ms": [1, 1, 1], "ratio": [value] * 3, "to": to, "rounds": 5, "saved_bytes": 8, "peak_bytes": 2**20}

    peers = {"BN": peer(1.0), "FBN T=5": peer(ratio), "FBN T=5 fused": peer(fused or ratio)}
    peers["FBN T=5"]["peak_bytes"] *= peak
    image = [224, 224]
    return {"model": model, "batch": batch, "image": image, "layout": layout, "dtype": dtype, "peers": peers}


def layer(ratios, **fields):
    row = {
        "pass": "forward+backward",
        "shape": [2, 4, 3, 3],
        "layout": "contiguous",
        "dtype": "float32",
        "outliers": 0.0,
    }
    peers = {
        name: {"ms": [1, 1, 1], "ratio": [ratio] * 3, "to": "BN", "rounds": 5, "saved_bytes": 8}
        for name, ratio in {"BN": 1.0, **ratios}.items()
    }
    return row | {"roofline_ms": {"BN": 1.0}, "peers": peers} | fields


def verdict(target, *files):
    return next(each.verdict for each in judge(files) if each.target is target)


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ((0.90, 0.95), "met"),
        ((0.90, 0.9501), "missed"),
        ((0.90,), "met, 1 row not measured"),
        ((1.2,), "missed, 1 row not measured"),
        ((float("nan"), 0.9), "missed"),
        ((), "not measured"),
    ],
)
def test_every_row_has_to_meet_its_aim(ratios, expected):
    models = [step(ratio, *place) for ratio, place in zip(ratios, (("resnet50", 64), ("vgg16", 16)))]
    assert verdict(FIRST, results(models=models)) == expected


def test_rows_of_another_kind_do_not_count():
    others = [
        step(9.0, batch=8),
        step(9.0, dtype="bfloat16"),
        step(9.0, layout="channels_last"),
        step(9.0, "mask_rcnn_R_50_FPN"),
    ]
    assert verdict(FIRST, results(models=others)) == "not measured"
    assert verdict(FIRST, results("cpu", models=[step(0.5)])) == "not measured"
    assert verdict(FIRST, results(quick=True, models=[step(0.5)])) == "not measured"


def test_a_median_is_an_aim_of_its_own():
    target = next(target for target in TARGETS if target.device == "cpu" and target.median == 0.75)

    def found(ratio, rows=20):
        return verdict(target, results("cpu", layers=[layer({"FBN T=2": ratio, "FBN T=5": 0.9})] * rows))

    assert found(0.59) == "met" and found(0.61) == "missed"
    assert found(0.59, 19) == "met, 2 rows not measured"
    forward = layer({"FBN T=2": 9.0}) | {"pass": "forward"}
    assert verdict(target, results("cpu", layers=[forward])) == "not measured"


def test_memory_and_first_steps():
    memory = next(target for target in TARGETS if target.value == "peak")
    assert verdict(memory, results(models=[step(9.0, peak=1.0002)] * 4)) == "met"
    assert verdict(memory, results(models=[step(0.1, peak=1.01)] * 4)) == "missed"
    cold, warm = (target for target in TARGETS if target.value == "seconds")
    row = {"model": "resnet50", "batch": 64, "image": [224, 224], "extra_seconds": {"cold": 9.0, "warm": 0.6}}
    row["seconds"] = {"BN": [1.0, 1.2], "cold": [10.1], "warm": [1.7]}
    both = results(first_steps=[row])
    assert (verdict(cold, both), verdict(warm, both)) == ("met", "missed")
    assert "10.10" in markdown(both)


def test_several_files_are_judged_together():
    one, other = results(models=[step(0.9)]), results(models=[step(0.8, "vgg16", 16)])
    assert verdict(FIRST, one, other) == "met"
    line = next(line for line in target_table([one, other]) if line[0] == FIRST.what)
    assert line[1:] == [
        "2 of 2",
        "0.85 (0.80..0.90)",
        "<= 0.95",
        "met",
        "resnet50 64x224x224 contiguous float32 FBN T=5",
    ]


def test_without_files_nothing_is_measured():
    table = target_table([])
    assert len(table) == len(TARGETS) + 1
    assert all(line[2] == line[4] == "not measured" for line in table[1:])
    assert markdown().startswith("### Targets")


def test_figures_without_an_aim_have_no_verdict():
    target = next(target for target in TARGETS if target.every is None and target.kind == "layers")
    assert verdict(target, results(layers=[layer({"FBN T=inf": 3.0})] * 27)) == "no aim"


def test_targets_are_of_peers_and_kinds_that_there_are():
    from fbn_plugin.engine.benchmark import peers

    known = {peer.name for peer in (*peers.LAYER_PEERS, *peers.TARGET_LAYER_PEERS)} | {*peers.MODEL_PEERS}
    for target in TARGETS:
        assert isinstance(target, Target) and target.kind in KINDS and target.rows > 0
        assert {*target.peers} <= known | {"cold", "warm"}, target.what
    assert len({target.what for target in TARGETS}) == len(TARGETS)


def test_a_report_tells_what_failed(tmp_path):
    made = results(
        checks=[{"check": "a", "passed": True, "backend": "cuda: x"}, {"check": "b", "passed": False}],
        host=[layer({"FBN T=5": 1.04}, depth=20, outliers=0.0)],
        compiled=[step(1.01)],
    )
    for peer in made["compiled"][0]["peers"].values():
        peer["compile_seconds"] = 41.0
    made["notes"].append("WRONG: b")
    text = markdown(made)
    assert "1 of 2 checks passed (cuda: x)" in text and "Note: WRONG: b." in text and "41" in text
    assert "1000.0" in text, "the host's microseconds"


def test_a_report_says_that_a_quick_run_does_not_count():
    said = "quick run counts as not measured"
    assert said in markdown(results(quick=True)) and said not in markdown(results())
    assert said in markdown(results(), results(quick=True))


def test_files_of_earlier_versions_are_read(tmp_path):
    import json

    file = tmp_path / "old.json"
    old = {key: value for key, value in results("cpu").items() if key not in KINDS[2:]}
    file.write_text(json.dumps(old))
    assert load(file) == results("cpu")
