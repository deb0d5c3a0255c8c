"""Values of detectron2's config: those of a wrong type, and the sentence on what detectron2 refuses."""

from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="detectron2 is not installed")

import detectron2.model_zoo
from detectron2.config import get_cfg

from fbn_plugin.engine.detectron2.values import attempt, check_types, differences

pytestmark = pytest.mark.detectron2

ZOO = Path(detectron2.model_zoo.__file__).parent / "configs"


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("INPUT.MIN_SIZE_TRAIN", ("large",), "tuple of finite number, such as (800,), got ('large',)"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", [["a"]], "list of list of finite number, such as [[32, 64, 128, 256, 512]]"),
        ("MODEL.BACKBONE.FREEZE_AT", None, "finite number, such as 2, got None"),
        ("SOLVER.BASE_LR", float("nan"), "finite number, such as 0.001, got nan"),
        ("MODEL.PIXEL_STD", [1.0, float("inf"), 1.0], "list of finite number"),
        ("MODEL.RPN.HEAD_NAME", None, "str, such as 'StandardRPNHead', got None"),
        ("DATASETS.TRAIN", ([],), "tuple of str, such as ('my_data:train',), got ([],)"),
    ],
)
def test_types(key, value, words):
    cfg = get_cfg()
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError) as error:
        check_types(cfg)
    assert str(error.value).startswith(f"{key} must be of type {words}")


def test_detectron2s_own_configs_keep_to_them():
    files = sorted(ZOO.glob("COCO-*/*.yaml"))
    for file in files:
        cfg = get_cfg()
        cfg.merge_from_file(str(file))
        check_types(cfg)
    cfg.merge_from_list(["MODEL.ANCHOR_GENERATOR.SIZES", [32, 64], "SOLVER.WEIGHT_DECAY_BIAS", 0.1, "SOLVER.STEPS", []])
    check_types(cfg)
    assert files


def test_the_key_that_is_to_blame():
    """Found by what the config would be without it; an error without words is told by its line."""

    def build(cfg):
        if not cfg.MODEL.MASK_ON:
            raise NotImplementedError
        return cfg.MODEL.BACKBONE.FREEZE_AT

    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.MASK_ON", True])
    overrides = {"MODEL.BACKBONE.FREEZE_AT": 3, "MODEL.MASK_ON": True}
    assert attempt(cfg, "MODEL", build, overrides) == 2
    cfg.MODEL.MASK_ON = False
    reason = "is refused by detectron2: NotImplementedError at `raise NotImplementedError`"
    with pytest.raises(ValueError, match=f"^MODEL.MASK_ON False {reason}"):
        attempt(cfg, "MODEL", build, overrides)
    with pytest.raises(ValueError, match=f"^the config's MODEL {reason}"):
        attempt(cfg, "MODEL", build, {})
    assert differences(cfg, get_cfg()) == {}
    cfg.MODEL.BACKBONE.FREEZE_AT = 3
    assert differences(cfg, get_cfg()) == {"MODEL.BACKBONE.FREEZE_AT": 2}
