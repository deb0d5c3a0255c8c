"""The benchmark of the training loop: both loops run, and it ends."""

from pathlib import Path

from fbn_plugin.engine.benchmark import loop

CONFIGS = Path(__file__).parents[3] / "configs"


def test_both_take_turns(capsys, monkeypatch):
    monkeypatch.setattr(loop, "_ROUND", 0.01)
    monkeypatch.setattr(loop, "_SECONDS", 0.0)
    loop.main([str(CONFIGS / "Digits/lenet5_convs_BN.yaml"), "MODEL.DEVICE", "cpu"])
    said = capsys.readouterr().out.splitlines()[-2:]
    assert said[0].startswith("ms an iteration on") and "in 5 rounds" in said[1]
    median = float(said[1].split(" | ")[1])
    assert 0.5 < median < 50
