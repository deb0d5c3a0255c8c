"""Annotation files that detectron2 reads itself: refused as those that this project reads, or trained on and evaluated;
panoptic files; and what Python functions give beside objects."""

import json
import logging
from functools import partial

import numpy as np
import pytest
from coco_cases import ODD_FILES, READ, REFUSED, SOUND, SQUARE, content, write_case
from PIL import Image

pytest.importorskip("detectron2", reason="detectron2 is not installed")
from coco_in_detectron2 import check, config, forget, use

pytestmark = [pytest.mark.detectron2, pytest.mark.usefixtures("forgotten", "one_thread")]


@pytest.fixture
def forgotten():
    """What a test registers is gone afterwards."""
    from detectron2.data import DatasetCatalog

    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        forget(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("set")


def registered(folder, text, name="case"):
    from detectron2.data.datasets import register_coco_instances

    file = write_case(folder, text)
    register_coco_instances(name, {}, str(file), str(folder))
    return name


def assert_refused(folder, name, words, **changes):
    with pytest.raises((ValueError, OSError)) as error:
        check(config(name, **changes))
    sentence = str(error.value)
    assert words in sentence and str(folder) in sentence and "\n" not in sentence, sentence


@pytest.mark.parametrize("case", REFUSED)
def test_refused(folder, case):
    change, words = REFUSED[case]
    assert_refused(folder, registered(folder, content(change)), words)


@pytest.mark.parametrize("case", [*READ, *(case for case, (_, words) in ODD_FILES.items() if words is None)])
def test_read(folder, case, tmp_path):
    """All that a training and an evaluation do with the set."""
    change, masks = READ.get(case, (None, 2))
    name = registered(folder, content(change) if change else ODD_FILES[case][0])
    cfg = config(name, classes=2 if case == "two categories of one name" else 1)
    if change and masks == 2:
        cfg.INPUT.MASK_FORMAT = "polygon" if isinstance(_mask(change), list) else "bitmask"
    check(cfg)
    figures = use(cfg, name, tmp_path, (40, 50))
    assert figures["bbox"]["AP"] > 20 and figures["segm"]["AP"] > 20  # an object without mask or extent is missed


def _mask(change):
    return json.loads(content(change))["annotations"][0]["segmentation"]


@pytest.mark.parametrize("case", [case for case, (_, words) in ODD_FILES.items() if words is not None])
def test_files(folder, case):
    text, words = ODD_FILES[case]
    assert_refused(folder, registered(folder, text), words)


def test_a_sound_file_is_left_to_detectron2(folder):
    """And one with what it does not know is read in its place, in its order, in each process."""
    from detectron2.data import DatasetCatalog

    from fbn_plugin.engine.detectron2.annotation_files import read_in_its_place
    from fbn_plugin.engine.detectron2.data import checked

    def turned(coco):
        coco["images"].reverse()
        coco["annotations"][0]["segmentation"] = SQUARE

    sound = registered(folder, content(lambda coco: None))
    assert check(config(sound)) == [] and sound not in checked
    theirs = DatasetCatalog.get(sound)
    (folder / "odd").mkdir()
    odd = registered(folder / "odd", content(turned), "odd")
    cfg = config(odd)
    assert check(cfg) == [odd] and check(cfg) == [odd]
    ours = DatasetCatalog.get(odd)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["image_id"] == other["image_id"]
        assert [each["segmentation"] for each in mine["annotations"]] == [
            each["segmentation"] for each in other["annotations"]
        ]
    del checked[odd]  # as in a process that has read nothing yet
    read_in_its_place([odd], cfg)
    assert odd in checked and DatasetCatalog.get(odd) == ours


def test_a_loader_of_the_users_keeps_its_place(folder):
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from fbn_plugin.engine.detectron2.data import checked

    file = write_case(folder, content(READ["an area of null"][0]))
    DatasetCatalog.register("mine", lambda: [])
    MetadataCatalog.get("mine").set(json_file=str(file), image_root=str(folder), evaluator_type="coco")
    assert_refused(folder, "mine", "has what detectron2 does not read: 'area' null")
    assert check(config("mine", **{"DATASETS.TEST": ()})) == [] and "mine" not in checked


def _second(value, coco):
    coco["annotations"][1]["keypoints"] = value


def test_keypoints(folder, tmp_path):
    from detectron2.data import MetadataCatalog
    from detectron2.data.datasets import register_coco_instances

    def learned(name, change=lambda coco: None):
        def both(coco):
            for each in coco["annotations"]:
                each["keypoints"] = [6, 6, 2, 9, 9, 1]
            change(coco)

        file = write_case(folder / name, content(both))
        points = {"keypoint_names": ["a", "b"], "keypoint_flip_map": [("a", "b")]}
        register_coco_instances(name, points, str(file), str(folder / name))
        keys = {"MODEL.KEYPOINT_ON": True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 2}
        return config(name, **keys, **{"TEST.KEYPOINT_OKS_SIGMAS": [0.1, 0.1]})

    cfg = learned("without num_keypoints")
    assert check(cfg) == ["without num_keypoints"]
    from fbn_plugin.engine.detectron2.data import TrainingData, checked

    assert [each["num_keypoints"] for each in checked["without num_keypoints"].annotations] == [2, 2]
    for record in TrainingData(cfg)._images:
        assert record["instances"].gt_keypoints.tensor[0, :, 2].tolist() in ([2, 1], [1, 2])
    for value, words in (([6, 6, 2], "a list of 6 numbers, x, y and visibility of 2 keypoints"), (None, "got None")):
        cfg = learned(f"keypoints {value}", partial(_second, value))
        with pytest.raises(ValueError, match=words):
            check(cfg)
        MetadataCatalog.pop(f"keypoints {value}")


# --- panoptic files, semantic maps ---------------------------------------------------------------------------------

PANOPTIC = {
    "images": SOUND["images"],
    "annotations": [
        {"image_id": i, "file_name": f"{i}.png", "segments_info": [{"id": 5, "category_id": 1, "iscrowd": 0}]}
        for i in (1, 2)
    ],
    "categories": [{"id": 1, "name": "x", "isthing": 1}],
}


def segment(**changes):
    return lambda found: found["annotations"][0]["segments_info"][0].update(changes)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda found: found.pop("annotations"), "it has no list 'annotations'"),
        (lambda found: found["annotations"].insert(0, 5), "annotation number 1 must be an object"),
        (lambda found: found["annotations"][0].update(image_id=[1]), "'image_id' must be a whole number, got [1]"),
        (lambda found: found["annotations"][0].update(file_name="../1.png"), "a path inside of the folder"),
        (lambda found: found["annotations"][0].update(file_name="pipe"), "pipe is no file"),
        (lambda found: found["annotations"][0].pop("segments_info"), "annotation number 1 lacks 'segments_info'"),
        (lambda found: found["annotations"][0].update(segments_info={}), "'segments_info' must be a list"),
        (lambda found: found["annotations"][0].update(segments_info=[1]), "segment number 1 must be an object"),
        (segment(id="5"), "'id' must be a whole number from 0 to 16,777,215, got '5'"),
        (segment(category_id=7), "'category_id' must be one of the set's 1 category, got 7"),
        (segment(category_id=[1]), "got [1]"),
        (segment(iscrowd=None), "'iscrowd' must be a whole number from 0 to 1, got None"),
        (lambda found: found["categories"][0].pop("isthing"), "category 1 lacks 'isthing'"),
    ],
)
def test_panoptic_files(folder, tmp_path, change, words):
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from fbn_plugin.engine.detectron2.annotation_files import _check_panoptic_file

    write_case(folder, content(lambda coco: None))
    file = tmp_path / "panoptic.json"
    DatasetCatalog.register("panoptic", list)
    metadata = MetadataCatalog.get("panoptic").set(
        panoptic_json=str(file), panoptic_root=str(folder), thing_dataset_id_to_contiguous_id={1: 0}
    )
    file.write_text(json.dumps(PANOPTIC))
    _check_panoptic_file(metadata, evaluated=True)
    found = json.loads(json.dumps(PANOPTIC))
    change(found)
    file.write_text(json.dumps(found))
    with pytest.raises((ValueError, OSError)) as error:
        _check_panoptic_file(metadata, evaluated=True)
    assert words in str(error.value)
    file.write_bytes(b"\xef\xbb\xbf{}")
    with pytest.raises(ValueError, match="has what detectron2 does not read: a byte-order mark"):
        _check_panoptic_file(metadata, evaluated=True)


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"segmentation": [[1, 2, float("nan"), 4, 5, 6]]},
            "'segmentation' must be polygons of finite numbers, got nan",
        ),
        ({"segmentation": [[1, 2, 1e9, 4, 5, 6]]}, "'segmentation' must be within"),
        ({"segmentation": {"size": [40, 50], "counts": [0, 10]}}, "runs that add up to 10"),
        ({"segmentation": {"size": [40, 50], "counts": [0, 2000]}}, "INPUT.MASK_FORMAT must be 'bitmask'"),
        ({"segmentation": np.ones((2, 2, 2))}, "a 'segmentation' of shape (2, 2, 2)"),
        ({"bbox": [1, 2, 10**400, 4]}, "int too large"),
        ({"bbox": [1, 2, float("inf"), 4]}, "'bbox' must be 4 finite numbers, got inf"),
        ({"iscrowd": "0"}, "'iscrowd' must be 0 or 1, got '0'"),
        ({"category_id": 3}, "the category_id 3, and there are 1 thing_classes"),
        (None, "a str for a dict among its 'annotations'"),
        ({"sem_seg_file_name": "nowhere.png"}, "nowhere.png is not there"),
        ({"file_name": 5}, "image number 0 must have a path as 'file_name', got 5"),
        ({"file_name": "nowhere.png"}, "nowhere.png"),
    ],
)
@pytest.mark.parametrize("with_stuff", [True, False])
def test_records_of_functions(folder, changes, words, with_stuff):
    """Those of sets with semantic maps, which detectron2 reads itself, and of others."""
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.structures import BoxMode

    write_case(folder, content(lambda coco: None))
    Image.fromarray(np.zeros((40, 50), np.uint8)).save(folder / "map.png")
    each = {"bbox": [1, 2, 9, 9], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "segmentation": [[1, 2, 3, 4, 5, 1]]}
    record = {"file_name": str(folder / "1.png"), "image_id": 1, "height": 40, "width": 50}
    record |= {"sem_seg_file_name": str(folder / "map.png"), "annotations": [each]}
    if changes is None:
        record["annotations"] = ["x"]
    else:
        for name, value in changes.items():
            (record if "file_name" in name else each)[name] = value
    DatasetCatalog.register("function", lambda: [record])
    metadata = MetadataCatalog.get("function").set(thing_classes=["x"])
    if with_stuff:
        ids = {"thing_dataset_id_to_contiguous_id": {0: 0}, "stuff_dataset_id_to_contiguous_id": {0: 0}}
        metadata.set(stuff_classes=["a"], evaluator_type="coco_panoptic_seg", **ids)
    elif "sem_seg_file_name" in (changes or ()) or "INPUT.MASK_FORMAT" in words:
        pytest.skip("is read by the ones with stuff alone, or turned into bitmasks")
    cfg = config("function", **{"INPUT.MASK_FORMAT": "polygon", "MODEL.META_ARCHITECTURE": "GeneralizedRCNN"})
    cfg.DATASETS.TEST = ()
    with pytest.raises((ValueError, OSError)) as error:
        check(cfg)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_what_is_left_out_is_counted(folder, caplog):
    name = registered(folder, content(lambda coco: coco["annotations"][0].update(segmentation=[[1, 2]])))
    with caplog.at_level(logging.WARNING, "fbn_plugin"):
        check(config(name))
    said = [record.message for record in caplog.records]
    assert f"{folder / 'train.json'} left out: polygons of fewer than 3 points (1)" in said
    assert f"{name}: 1 of 2 annotations without a mask, left out" in said
