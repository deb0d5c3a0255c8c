"""Finding a set in COCO's format by its name: detectron2's own names, a folder and a split, or what a module of the
user's has registered in detectron2's catalog."""

import re
import sys
from pathlib import Path

from fbn_plugin.engine.data.coco_data import CocoDataset, read_dataset
from fbn_plugin.engine.data.locations import data_root

__all__ = ["resolve_dataset"]

# detectron2's names below $DETECTRON2_DATASETS: (annotations, images).
_BUILTIN = {
    f"coco_{year}_{split}": (f"coco/annotations/instances_{split}{year}{tail}.json", f"coco/{folder}{year}")
    for year, split, tail, folder in (
        ("2014", "train", "", "train"),
        ("2014", "val", "", "val"),
        ("2017", "train", "", "train"),
        ("2017", "val", "", "val"),
    )
} | {
    "coco_2014_minival": ("coco/annotations/instances_minival2014.json", "coco/val2014"),
    "coco_2014_valminusminival": ("coco/annotations/instances_valminusminival2014.json", "coco/val2014"),
    "coco_2017_val_100": ("coco/annotations/instances_val2017_100.json", "coco/val2017"),
}


def resolve_dataset(name: str) -> CocoDataset:
    """Find and read a COCO-format set.

    Args:
        name: detectron2's name (``coco_2017_train``, ``coco_2017_val``, ...; below $DETECTRON2_DATASETS, default
            ``datasets``), or ``FOLDER:SPLIT``. FOLDER is absolute, or relative to $DETECTRON2_DATASETS or to the
            current folder. Annotations are looked for in FOLDER/annotations, FOLDER and FOLDER/SPLIT
            (``instances_train.json``, ``train.json``, ``instances_train2017.json``, ...), images in FOLDER/SPLIT,
            FOLDER/SPLIT2017, FOLDER/images, FOLDER/images/SPLIT and FOLDER. Or a name that was registered in
            detectron2's ``DatasetCatalog``, by a module that is imported.

    Raises:
        FileNotFoundError, ValueError: one sentence with the path or the entry that is wrong.
    """
    root = data_root()
    if name in _BUILTIN:
        json_file, image_root = (root / path for path in _BUILTIN[name])
        if not json_file.is_file():
            raise FileNotFoundError(f"dataset {name!r} wants {json_file}, which is not there; set DETECTRON2_DATASETS")
        return read_dataset(name, json_file, [image_root])
    if "detectron2.data" in sys.modules:  # nothing is registered there as long as nobody has imported it
        from fbn_plugin.engine.detectron2.registered import registered_dataset

        if (registered := registered_dataset(name)) is not None:
            return registered
    folder_name, _, split = name.rpartition(":")
    if (name[:1], name[-1:]) in (("(", ")"), ("[", "]")):
        raise ValueError(f"unknown dataset {name!r}; names in a list stand in quotes, such as ('my_data:train',)")
    if not folder_name or not split:
        raise ValueError(
            f"unknown dataset {name!r}; use FOLDER:SPLIT, such as 'my_data:train', or {', '.join(_BUILTIN)}, or "
            "--import the module that registers it in detectron2's DatasetCatalog"
        )
    given = Path(folder_name).expanduser()
    folder = next((path for path in (root / given, given) if path.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"dataset {name!r}: there is no folder {given}, nor {root / given}")
    json_file = _find_annotations(name, folder, split)
    tags = dict.fromkeys([split, json_file.stem.removeprefix("instances_"), f"{split}2017"])
    roots = [path for tag in tags for path in (folder / tag, folder / "images" / tag, folder / tag / "images")]
    return read_dataset(name, json_file, [*roots, folder / "images", folder, json_file.parent])


def _find_annotations(name: str, folder: Path, split: str) -> Path:
    # The split as a word of its own, a year may follow: "trainval" is neither "train" nor "val".
    word = re.compile(rf"(?<![a-zA-Z0-9]){re.escape(split)}(?![a-zA-Z])")
    other = re.compile(r"^(captions|person_keypoints|panoptic|stuff|image_info)_")
    found = [
        p for where in (folder / "annotations", folder) for p in sorted(where.glob("*.json")) if not other.match(p.name)
    ]
    for candidates in (
        [p for p in found if p.stem in (f"instances_{split}", split)],
        [p for p in found if word.search(p.stem)],
        sorted((folder / split).glob("*.json")),
    ):
        if candidates:
            if len({p.name for p in candidates}) > 1:
                names = ", ".join(str(p.relative_to(folder)) for p in candidates)
                raise ValueError(f"dataset {name!r}: more than one annotation file fits: {names}")
            return candidates[0]
    seen = f"only {', '.join(p.name for p in found)}" if found else "no .json file"
    raise FileNotFoundError(
        f"dataset {name!r}: no annotations for {split!r} in {folder / 'annotations'} or {folder}, {seen}"
    )
