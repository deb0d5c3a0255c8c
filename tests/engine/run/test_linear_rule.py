"""The linear rule, on settings of a detection run."""

import pytest

from fbn_plugin.engine.run.config import load_config
from fbn_plugin.engine.run.detection_keys import detection_config
from fbn_plugin.engine.run.linear_rule import scale_to_processes


def config(**solver):
    overrides = [word for key, value in solver.items() for word in (f"SOLVER.{key}", str(value))]
    return load_config(detection_config(), None, [*overrides, "TEST.EVAL_PERIOD", "40"])


def test_batch_and_rate_grow_with_the_processes_and_the_schedule_shrinks():
    cfg = config(
        REFERENCE_WORLD_SIZE=2, IMS_PER_BATCH=4, BASE_LR=0.02, MAX_ITER=100, STEPS=(60, 80), CHECKPOINT_PERIOD=50
    )
    cfg.defrost()
    cfg.TEST.EVAL_ITERATIONS, cfg.SOLVER.WARMUP_ITERS = (30, 31, 90), 10
    cfg.freeze()
    before = cfg.dump()
    assert scale_to_processes(cfg, 2) is cfg
    for processes, factor in ((1, 0.5), (8, 4)):
        said = []
        scaled = scale_to_processes(cfg, processes, said.append)
        solver, test = scaled.SOLVER, scaled.TEST
        assert pytest.approx([4 * factor, 0.02 * factor]) == [solver.IMS_PER_BATCH, solver.BASE_LR]
        counts = [solver.MAX_ITER, *solver.STEPS, solver.CHECKPOINT_PERIOD, solver.WARMUP_ITERS, test.EVAL_PERIOD]
        assert counts == [round(count / factor) for count in (100, 60, 80, 50, 10, 40)]
        chosen = (60, 62, 180) if factor < 1 else (8, 22)  # none twice
        assert chosen == test.EVAL_ITERATIONS
        assert scale_to_processes(scaled, processes) is scaled and scaled.is_frozen()
        assert len(said) == 1 and f"IMS_PER_BATCH {solver.IMS_PER_BATCH}" in said[0]
    assert scale_to_processes(cfg, 400).TEST.EVAL_PERIOD == 1  # 0 would be never
    assert cfg.dump() == before


def test_without_a_reference_nothing_changes():
    cfg = config()
    assert scale_to_processes(cfg, 8) is cfg
