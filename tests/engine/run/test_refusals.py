"""What no run begins with, and what ends one."""

import math

import pytest

from fbn_plugin.engine.run.config import CfgNode
from fbn_plugin.engine.run.refusals import check_enough_iterations, check_finite, check_run, check_state


def config(folder, images=4, weights="", **model):
    return CfgNode(
        {"MODEL": {"WEIGHTS": weights, **model}, "SOLVER": {"IMS_PER_BATCH": images}, "OUTPUT_DIR": str(folder)}
    )


def check(cfg, norm="FBN", device="cpu", processes=1, resume=False, eval_only=False, saved=None, may_change=()):
    return check_run(cfg, {"NORM": norm}, device, processes, resume, eval_only, lambda: saved or cfg, may_change)


@pytest.mark.parametrize("images, processes", [(3, 2), (0, 1), (-4, 2)])
def test_a_batch_is_a_multiple_of_the_processes(tmp_path, images, processes):
    with pytest.raises(ValueError, match=rf"SOLVER.IMS_PER_BATCH must be .*\({processes}\), got {images}"):
        check(config(tmp_path, images), processes=processes)
    assert not check(config(tmp_path, images, "a.pth"), processes=processes, eval_only=True)
    assert not check(config(tmp_path, 4), processes=processes)


@pytest.mark.parametrize("norm", ["SyncBN", "nnSyncBN", "SyncBN()"])
def test_synchronized_batch_norm_of_processes_on_the_cpu(tmp_path, norm):
    cfg = config(tmp_path, weights="a.pth")
    with pytest.raises(ValueError, match="NORM must be .*SyncFBN.*, got 'n*SyncBN"):
        check(cfg, norm, processes=2)
    for fits in ({"processes": 1}, {"processes": 2, "device": "cuda"}, {"processes": 2, "eval_only": True}):
        assert not check(cfg, norm, **fits)
    assert not check(cfg, "SyncFBN", processes=2)


def test_an_evaluation_wants_weights(tmp_path):
    for cfg, words in ((config(tmp_path), "set MODEL.WEIGHTS, or"), (config(tmp_path, PRETRAINED=False), "PRETRAINED")):
        with pytest.raises(ValueError, match=f"nothing to evaluate: .*{words}"):
            check(cfg, eval_only=True, resume=True)
    assert not check(config(tmp_path, PRETRAINED=True), eval_only=True)
    (tmp_path / "last_checkpoint").touch()
    assert check(config(tmp_path), eval_only=True, resume=True)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        check(config(tmp_path), eval_only=True)


def test_a_run_goes_on_as_it_began(tmp_path):
    assert not check(config(tmp_path), resume=True)
    (tmp_path / "last_checkpoint").touch()
    saved = config(tmp_path, images=8)
    with pytest.raises(ValueError, match="SOLVER.IMS_PER_BATCH must be 8 as in .*, got 4"):
        check(config(tmp_path), resume=True, saved=saved)
    assert check(config(tmp_path), resume=True, saved=saved, may_change=["SOLVER.*"])
    assert check(config(tmp_path), resume=True, saved=saved, eval_only=True)


def test_what_a_checkpoint_must_have():
    check_state("a.pth", {"model": {}, "iteration": 3})
    with pytest.raises(ValueError, match="a.pth is not of a run of this tool: it has no seed"):
        check_state("a.pth", {"iteration": 3}, ("iteration", "seed"))
    check_enough_iterations("SOLVER.MAX_ITER", 5, 5, 5, "out")
    with pytest.raises(ValueError, match="SOLVER.MAX_EPOCH must be enough for the 6 iterations .* out holds, got 2"):
        check_enough_iterations("SOLVER.MAX_EPOCH", 2, 5, 6, "out")


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_diverged(loss):
    check_finite({"total_loss": 1.0, "other": math.nan}, 0)
    with pytest.raises(FloatingPointError, match=rf"at iteration 7 \(total_loss {loss:g}, mask 2\)"):
        check_finite({"total_loss": loss, "mask": 2.0}, 7)
