"""The benchmark's arithmetic, peers, files and command line; no test depends on how long anything takes."""

import functools
import gc
import importlib.util
import io
import itertools
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from fbn_plugin.engine import benchmark
from fbn_plugin.engine.benchmark import Settings, markdown, models, peers, plot, rows, runner
from fbn_plugin.engine.benchmark.layers import layer_input
from fbn_plugin.engine.benchmark.peers import LAYER_PEERS
from fbn_plugin.engine.benchmark.report import summary_table
from fbn_plugin.engine.benchmark.targets import TARGETS
from fbn_plugin.engine.benchmark.timing import host_timer, interleave, memory_of, summarize
from fbn_plugin.layers import FilteredBatchNorm2d

TOOL = Path(__file__).parents[3] / "tools" / "benchmark.py"
QUICK = ["--quick", "--seconds-per-row", "0.001"]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("benchmark_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_model(name):
    block = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    return nn.Sequential(block, nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.fixture(scope="module")
def results():
    settings = Settings(
        quick=True, models=("resnet50",), batch_size=3, shapes=((2, 6, 5, 5),), seconds_per_row=1e-3, threads=1
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "_built", small_model)
        return benchmark.run(settings)


def test_ratios_are_taken_within_a_round():
    # The machine slows down fourfold after the first round: medians over rounds see it, ratios do not.
    times = {"BN": [1.0, 4.0, 4.0], "FBN": [0.5, 2.0, 3.0]}
    found = summarize(times, {"BN": "BN", "FBN": "BN"})
    assert found["FBN"] == {"ms": [1250, 2000, 2500], "ratio": [0.5, 0.5, 0.625], "to": "BN", "rounds": 3}
    assert found["BN"]["ratio"] == [1, 1, 1]
    assert summarize({"BN": [2.0]}, {"BN": "BN"})["BN"]["ms"] == [2000, 2000, 2000]


def test_peers_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    clock = itertools.count()

    def timer(call):
        assert not gc.isenabled()
        call()
        return next(clock)

    times = interleave(calls, 0, 20, timer)
    assert gc.isenabled()
    rounds = [order[i : i + 3] for i in range(0, 60, 3)]
    assert all(sorted(each) == list("abc") for each in rounds) and len({tuple(each) for each in rounds}) > 1
    assert {name: len(each) for name, each in times.items()} == {"a": 20, "b": 20, "c": 20}
    assert sorted(itertools.chain(*times.values())) == list(range(60))


def test_naive_form_is_filtered_batch_norm():
    torch.manual_seed(0)
    x = layer_input((8, 3, 16, 16), 5e-3, "contiguous", "float32", "cpu")
    naive, own = peers.NaiveFilteredBatchNorm2d(3), FilteredBatchNorm2d(3, t_sigma=5.0)
    own.load_state_dict(naive.state_dict())
    grad = torch.randn_like(x)
    expected = torch.autograd.grad(own(x), [x, *own.parameters()], grad)
    for ours, theirs in zip(torch.autograd.grad(naive(x), [x, *naive.parameters()], grad), expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(naive.running_var, own.running_var)
    torch.testing.assert_close(naive.eval()(x), own.eval()(x))


def test_fused_peer_is_filtered_batch_norm_then_relu():
    built = {peer.name: peer.build(4) for peer in (*LAYER_PEERS, *peers.TARGET_LAYER_PEERS)}
    x = layer_input((4, 4, 8, 8), 0.0, "contiguous", "float32", "cpu")
    torch.testing.assert_close(built["FBN+ReLU fused"](x), built["FBN, ReLU"](x))
    residual = torch.randn_like(x)
    torch.testing.assert_close(built["BN, add, ReLU"](x, residual), (built["BN"](x) + residual).relu())
    torch.testing.assert_close(built["FBN+add+ReLU fused"](x, residual), (built["FBN T=5"](x) + residual).relu())


def test_inputs_have_the_outliers_that_they_say():
    for share in (0.0, 1e-2):
        x = layer_input((64, 4, 16, 16), share, "channels_last", "float32", "cpu").detach()
        assert x.is_contiguous(memory_format=torch.channels_last)
        std, mean = torch.std_mean(x, (0, 2, 3), keepdim=True)
        far = ((x - mean).abs() > 5 * std).float().mean().item()
        assert far == 0 if share == 0 else far == pytest.approx(share, rel=0.1)
        assert (mean.abs() > 0.3).all(), "a mean away from zero"


def test_memory_counts_each_storage_once_and_no_parameters():
    x = torch.randn(4, 2, 16, 16, requires_grad=True)
    weight = torch.randn(2, 1, 1, requires_grad=True)

    def call():
        y = x * weight  # keeps x and the weight
        (y.sigmoid() * y).sum().backward()  # keeps y, and the sigmoid's result for itself and for the product

    assert memory_of(call, "cpu", [weight]) == {"saved_bytes": 3 * 4 * x.numel()}


def test_results_hold_every_row_and_peer(results):
    assert len(results["layers"]) == 8, "two layouts, with and without outliers, two passes"
    assert len({(r["layout"], r["outliers"], r["pass"]) for r in results["layers"]}) == 8
    names = {peer.name for peer in LAYER_PEERS}
    for row in results["layers"]:
        assert row["shape"] == [2, 6, 5, 5] and row["dtype"] == "float32" and row["tensor_bytes"] == 4 * 300
        assert row["peers"].keys() == names
        sizes = {"forward": (3, 4), "forward+backward": (8, 9)}[row["pass"]]
        copy_ms = 2 * row["tensor_bytes"] / row["copy_gb_per_s"] / 1e6
        assert list(row["roofline_ms"].values()) == pytest.approx([n / 2 * copy_ms for n in sizes])
        for name, peer in row["peers"].items():
            low, middle, high = peer["ratio"]
            assert 0 < low <= middle <= high and peer["to"] in names and peer["rounds"] >= 2
            assert name != peer["to"] or peer["ratio"] == [1, 1, 1]
            assert ("saved_bytes" in peer) == (row["pass"] == "forward+backward")
    (model,) = results["models"]
    assert (model["model"], model["batch"]) == ("resnet50", 3)
    assert model["peers"].keys() == {*peers.MODEL_PEERS}
    saved = {name: peer["saved_bytes"] for name, peer in model["peers"].items()}
    assert saved["BN"] <= saved["FBN T=5"] < 1.3 * saved["BN"] < saved["naive FBN"]
    assert results["environment"]["torch"] == torch.__version__ and results["environment"]["threads"] == 1


def test_the_host_is_timed_over_several_calls_without_waiting():
    calls = []
    assert host_timer("cpu", 7)(lambda: calls.append(0)) >= 0 and len(calls) == 7


def test_models_have_the_norms_that_are_replaced():
    counts = {}
    for name in benchmark.MODELS:
        for peer, make in peers.MODEL_PEERS.items():
            with torch.device("meta"):
                model = make(models.build_model(name))
            counts[name, peer] = sum(type(module) is nn.BatchNorm2d for module in model.modules())
    expected = {"vgg16": 13, "resnet50": 53, "mask_rcnn_R_50_FPN": 53, "mask_rcnn_X_101_32x8d_FPN": 104}
    assert counts == {(name, peer): n * (peer == "BN") for name, n in expected.items() for peer in peers.MODEL_PEERS}


def test_every_peer_is_in_the_tables_and_the_picture(results):
    text = markdown(results)
    for peer in LAYER_PEERS:
        assert peer.name == peer.to or f"({peer.name}) / ({peer.to})" in text
    assert "2x6x5x5" in text and "resnet50" in text and results["environment"]["cpu"] in text
    image = Image.open(io.BytesIO(plot(results)))
    assert min(image.size) > 400 and image.convert("L").getextrema() == (0, 255)


def test_summary_is_over_all_rows(results):
    rows = [row for row in results["layers"] if row["pass"] == "forward+backward"]
    for row, ratio in zip(rows, (0.5, 0.7, 0.9, 1.5)):
        row["peers"]["FBN T=2"]["ratio"] = [ratio] * 3
    (line,) = [
        line for line in summary_table(results) if line[:3] == ["forward+backward", "float32", "(FBN T=2) / (BN)"]
    ]
    assert line[3:6] == ["0.80", "0.50", "1.50"] and line[-1] == "4"


def test_command_writes_what_it_can_read(tool, tmp_path, capsys):
    file, picture = tmp_path / "out.json", tmp_path / "out.png"
    threads = torch.get_num_threads()
    arguments = ["--layers", "--shapes", "2x4x3x3", "--layouts", "contiguous", "--threads", "1"]
    made = tool.main([*QUICK, *arguments, "--output", str(file), "--plot", str(picture)])
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    assert json.loads(file.read_text()) == made == benchmark.load(file), "plain JSON types, nothing lost"
    assert made["models"] == [] and len(made["layers"]) == 4
    drawn = Image.open(picture).size
    picture.unlink()
    assert tool.main(["--from", str(file), "--plot", str(picture)]) == [made]
    assert capsys.readouterr().out == printed and Image.open(picture).size == drawn
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.png"]


def test_interrupted_run_keeps_its_rows(tool, tmp_path, monkeypatch):
    def interrupted(until, notes):
        raise KeyboardInterrupt

    monkeypatch.setattr(rows, "_model_rows", lambda settings: [rows.Row("models", "a model", interrupted)])
    file = tmp_path / "out.json"
    with pytest.raises(SystemExit) as stop:
        tool.main([*QUICK, "--shapes", "2x4x3x3", "--layouts", "contiguous", "--output", str(file)])
    assert stop.value.code == 130
    assert len(benchmark.load(file)["layers"]) == 4


def test_the_command_of_the_targets(tool, tmp_path, monkeypatch, capsys):
    def planner(settings):
        assert settings.targets and settings.minutes == 7.5
        return [rows.Row("checks", "good", good), rows.Row("host", "bad", bad)]

    def good(until, notes):
        return [{"check": "of a fake", "passed": True}]

    def bad(until, notes):
        assert len(benchmark.load(file)["checks"]) == 1, "what was measured before is on disk"
        raise RuntimeError("no luck")

    monkeypatch.setattr(benchmark, "run", functools.partial(runner.run, planner=planner, isolated=False))
    file = tmp_path / "gpu.json"
    made = tool.main(["--targets", "--output", str(file)])
    printed = capsys.readouterr()
    assert "  bad: not measured: no luck" in printed.err.splitlines()
    assert "1 of 1 checks passed" in printed.out and "Note: bad: not measured: no luck." in printed.out
    assert benchmark.load(file) == made
    assert tool.main(["--from"]) == [] and capsys.readouterr().out.count("not measured |") >= len(TARGETS)


def test_compiled_peer_is_left_out_with_a_note(monkeypatch):
    class NoCompiler(nn.BatchNorm2d):
        def forward(self, input):
            raise RuntimeError("no compiler\nand a long story")

    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    monkeypatch.setattr(rows, "COMPILED", peers.Peer("compiled", "BN", NoCompiler))
    settings = Settings(
        quick=True, compiled=True, models=(), layouts=("contiguous",), shapes=((2, 4, 3, 3),), seconds_per_row=1e-3
    )
    results = benchmark.run(settings)
    assert results["notes"] == ["compiled is left out: no compiler"] and "no compiler" in markdown(results)
    assert all("compiled" not in row["peers"] for row in results["layers"])


def test_detector_does_the_same_work_with_every_norm(one_thread):
    from fbn_plugin.models.mask_rcnn import mask_rcnn_fpn

    images, targets = models.training_data("mask_rcnn_R_50_FPN", (2, 64, 96), "cpu")
    shapes = {}
    for norm in ("BN", "GN"):
        torch.manual_seed(len(norm))
        model = mask_rcnn_fpn("resnet18", norm=norm, num_classes=81, box_fcs=(8, 8), mask_convs=(8,)).train()
        models.fix_work(model, images, targets)
        seen = shapes.setdefault(norm, [])
        for part in (model.backbone, model.roi_heads.box_head, model.roi_heads.mask_head):
            part.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0].shape))
        torch.manual_seed(0)
        with torch.no_grad():
            model(images, targets)
    assert shapes["BN"] == shapes["GN"]
    assert shapes["BN"][0][2:] == (64, 96) and shapes["BN"][1][0] == 1024 and shapes["BN"][2][0] > 6


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--models", "alexnet"], "unknown models 'alexnet'"),
        (["--layouts", "NHWC"], "accepted are contiguous, channels_last"),
        (["--dtypes", "float64"], "unknown dtypes 'float64'"),
        (["--shapes", "16x64"], "a shape must be N x C x H x W"),
        (["--shapes", "axbxcxd"], "got 'axbxcxd'"),
        (["--shapes", "1x64x1x1"], "at least 4 values"),
        (["--shapes", "2x0x8x8"], "(2, 0, 8, 8)"),
        (["--seconds-per-row", "0"], "above 0"),
        (["--seconds-per-row", "nan"], "above 0"),
        (["--minutes", "-3"], "minutes must be a number above 0, got -3.0"),
        (["--targets", "--models", "resnet50"], "--models has no meaning"),
        (["--from", "--plot", "out.png"], "--from gives 0"),
        (["--threads", "0"], "threads must be 1 or more"),
        (["--batch-size", "-1"], "batch size must be 1 or more"),
        (["--device", "tpu"], "cpu or cuda"),
        (["--output", "absent/out.json"], "in a folder that exists"),
        (["--output", "out.txt"], "ending in .json"),
        (["--plot", "out.pdf"], "ending in .png"),
        (["--from", "absent.json"], "absent.json"),
        (["--from", "text.json"], "text.json is not valid JSON"),
        (["--from", "other.json"], "does not hold results"),
        (["--from", "empty.json", "--plot", "out.png"], "nothing to draw"),
        (["--from", "empty.json", "--quick"], "--quick has no meaning"),
    ],
)
def test_bad_input_is_one_line(tool, tmp_path, monkeypatch, capsys, results, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    Path("text.json").write_text("no")
    Path("other.json").write_text('{"format": "another"}')
    Path("empty.json").write_text(json.dumps({**results, "layers": [], "models": []}))
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(benchmark, "run", lambda *_: pytest.fail("nothing may be measured"))
    with pytest.raises(SystemExit) as stopped:
        tool.main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and sentence in error
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_line(tool, capsys):
    with pytest.raises(SystemExit):
        tool.main(["--device", "cuda"])
    assert capsys.readouterr().err == "error: device cuda: this PyTorch sees no GPU\n"
