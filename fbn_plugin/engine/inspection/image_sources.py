"""Images to show to a network, wherever they lie and whether they have labels or not: a folder, a tar archive, a named
classification set, or a set in COCO's format."""

from __future__ import annotations

import os
from pathlib import Path

from fbn_plugin.engine.data.image_data import IMAGE_DATA, Images, load_image_data
from fbn_plugin.engine.data.image_files import FoundImages, image_names, images_in_archive, in_order
from fbn_plugin.engine.data.named_sets import resolve_dataset
from fbn_plugin.engine.files.words import counted, shown_path

__all__ = ["find_images", "spread"]


def find_images(source: str, mode: str = "RGB") -> tuple[Images, str]:
    """Find images.

    Args:
        source: a folder, whose images on whatever depth are taken; a tar archive; ``NAME:ROOT`` of a classification
            set, such as ``"cifar10_jpeg:data"`` or ``"digits"``, whose validation images are taken; or the name of a
            set in COCO's format, ``"coco_2017_val"`` or ``"FOLDER:SPLIT"``.
        mode: PIL mode of the images, ``"RGB"`` or ``"L"``.

    Returns:
        the images, whose labels mean nothing, and what they are called.

    Raises:
        FileNotFoundError, ValueError: there are none.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _in_folder(path, mode), path.resolve().name
    if path.is_file():
        if not source.lower().endswith(".tar"):
            raise ValueError(f"{shown_path(source)} is neither a folder nor a tar archive")
        found = images_in_archive(path)
        return Images(found.samples(found.classes), mode), "/".join(path.resolve().parts[-2:])
    name, _, root = source.partition(":")
    if name in IMAGE_DATA:
        data = load_image_data(name, root, mode)
        return data.val, f"{data.title}, validation"
    if ":" not in source and not source.startswith("coco_"):
        known = ", ".join(IMAGE_DATA)
        raise FileNotFoundError(
            f"images {source!r} are not there: name a folder, a tar archive, NAME:ROOT with NAME one of {known}, or "
            "FOLDER:SPLIT of a set in COCO's format"
        )
    data = resolve_dataset(source)
    return Images([(os.fspath(data.image_root / image["file_name"]), 0) for image in data.images], mode), data.name


def _in_folder(folder: Path, mode: str) -> Images:
    found = FoundImages(folder)
    names = sorted(image_names(found, []), key=in_order)
    if not names:
        raise ValueError(f"no images found in {shown_path(folder)}, nor in folders below it")
    return Images([(os.path.join(folder, name), 0) for name in names], mode)


def spread(images: Images, count: int) -> Images:
    """So many of the images, at equal distances through the set; 0 is all.

    Raises:
        ValueError: there are fewer.
    """
    if not count or count == len(images):
        return images
    if count > len(images):
        raise ValueError(
            f"--max-images must be at most {counted(len(images), 'image')}, as many as there are, got {count}"
        )
    return images.part([number * len(images) // count for number in range(count)])
