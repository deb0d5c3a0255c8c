"""Random damage to annotation files and to files of detections, for the sweeps over them."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from limited_process import assert_sound, outcomes
from PIL import Image
from pycocotools import mask as mask_utils

from fbn_plugin.engine.data.coco_data import CocoDataset, read_dataset

__all__ = ["HEIGHT", "WIDTH", "detections", "read", "sound", "sweep"]

HEIGHT, WIDTH = 12, 16

# What takes the place of a value: other types, extreme numbers, forms that other tools write.
STRANGE = (
    *(None, True, False, 0, 1, -1, 2, 3, 0.5, -0.0, 1e-320, 40.0, 1e9, -1e9, 1e308, 2**31, 2**63, -(2**63), 10**400),
    *(float("nan"), float("inf"), float("-inf"), "", "1", "x", "a\nb", "\ud800", "\0", "../1.png", "/etc/passwd", "."),
    *([], [[]], [None], {}, {"a": 1}, [1, 2, 3, 4], [[1, 2], [3, 4], [5, 1]], [[[1, 2], [3, 4], [5, 1]]]),
    *([0, HEIGHT * WIDTH], [0, 0, HEIGHT * WIDTH], [5, 0, 5], "0" * 30, "P" * 9, "o" * 5, "\xff", "PP`0"),
    *({"size": [HEIGHT, WIDTH], "counts": [0, 10]}, {"size": [HEIGHT, WIDTH], "counts": [100, 0, 20, 72]}),
    *([-50, -50, 500, 500], [0, 0, 0, 0], [1e3] * 8, [1, 1, 160, 1, 160, 120, 1, 120] * 40, 10**18, "1" * 5000),
)


def rle(seed: int) -> dict[str, Any]:
    pixels = np.random.default_rng(seed).integers(0, 2, (HEIGHT, WIDTH), dtype=np.uint8)
    code = mask_utils.encode(np.asfortranarray(pixels))
    return {"size": [HEIGHT, WIDTH], "counts": code["counts"].decode()}


def sound() -> dict[str, Any]:
    """Two images with five objects of two classes."""
    polygon = [2, 2, 12, 2, 12.5, 9, 2, 9]
    masks = [[polygon], rle(0), {"size": [HEIGHT, WIDTH], "counts": [20, 30, HEIGHT * WIDTH - 50]}, [polygon, polygon]]
    annotations = [
        {"id": i + 1, "image_id": 1 + i % 2, "category_id": 1 + i % 2, "bbox": [2, 2, 10.5, 7], "area": 70}
        | {"iscrowd": int(i == 4), "segmentation": masks[i % 4], "keypoints": [1, 2, 2] * 2, "num_keypoints": 2}
        for i in range(5)
    ]
    images = [{"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in (1, 2)]
    categories = [{"id": i, "name": f"class {i}", "supercategory": "x"} for i in (1, 2)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def detections() -> list[dict[str, Any]]:
    fields = {"bbox": [1.5, 2, 10, 6], "score": 0.5}
    return [{"image_id": 1 + i % 2, "category_id": 1 + i % 2, **fields, "segmentation": rle(i)} for i in range(4)]


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all values within one."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [*([path] if path else []), *(found for key, each in inner for found in places(each, (*path, key)))]


def at(value: Any, path: tuple) -> Any:
    for key in path:
        value = value[key]
    return value


def mutate(value: Any, rng: random.Random) -> None:
    """Change one thing: a value, a field that goes, is doubled or gets another name, two values that change places."""
    path = rng.choice(places(value))
    parent, key = at(value, path[:-1]), path[-1]
    kind = rng.choice(("replace", "replace", "replace", "delete", "double", "swap", "rename", "nest", "text", "scale"))
    if kind == "replace":
        parent[key] = copy.deepcopy(rng.choice(STRANGE))
    elif kind == "delete":
        del parent[key]
    elif kind == "double" and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(parent[key]))
    elif kind == "swap":
        other = rng.choice([each for each in places(value) if each[: len(path)] != path and path[: len(each)] != each])
        there = at(value, other[:-1])
        parent[key], there[other[-1]] = there[other[-1]], parent[key]
    elif kind == "rename" and isinstance(parent, dict):
        parent[f"{key} "] = parent.pop(key)
    elif kind == "nest":
        parent[key] = [parent[key]]
    elif kind == "text":
        parent[key] = json.dumps(parent[key])
    elif kind == "scale" and type(parent[key]) in (int, float):
        parent[key] = parent[key] * rng.choice((-1, 10, 0.1, 1e5))


def damage(text: bytes, rng: random.Random) -> bytes:
    """Change bytes of a file."""
    place, number = rng.randrange(len(text)), rng.choice((1, 1, 3, 40))
    kind = rng.choice(("flip", "cut", "insert", "repeat", "mark", "digit"))
    if kind == "flip":
        return text[:place] + bytes([text[place] ^ (1 << rng.randrange(8))]) + text[place + 1 :]
    if kind == "cut":
        return text[:place] + text[place + number :]
    if kind == "insert":
        return text[:place] + rng.choice((b"[" * 5000, b"9" * 5000, b"e400", b"-", b'"', b"NaN")) + text[place:]
    if kind == "repeat":
        return text[:place] + text[place : place + number] + text[place:]
    if kind == "mark":
        return rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\0")) + text
    digits = [i for i, byte in enumerate(text) if byte in b"0123456789"]
    place = rng.choice(digits)
    return text[:place] + bytes([rng.choice(b"0123456789.e-")]) + text[place + 1 :]


def mutated(value: Any, rng: random.Random) -> bytes:
    if rng.random() < 0.25:
        return damage(json.dumps(value).encode(), rng)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        mutate(value, rng)
    return json.dumps(value).encode()


def read(text: bytes, folder: Path) -> CocoDataset:
    (folder / "train.json").write_bytes(text)
    for i in (1, 2):
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / f"{i}.png")
    return read_dataset("mutated", folder / "train.json", [folder])


def sweep(function: Callable[[bytes], object], make: Callable[[], Any], count: int, seed: int) -> None:
    """Call a function on damaged files, in a process with limits; each must be used up or refused in a sentence."""
    whole = json.dumps(make())  # of which each case has values of its own
    cases = [mutated(json.loads(whole), random.Random(f"{seed} {number}")) for number in range(count)]
    ended = outcomes(function, cases, seconds=20)
    assert_sound(ended, cases, lambda text: text.decode(errors="replace"))
    for kind in ("done", "refused"):
        assert sum(each.kind == kind for each in ended) > count / 20
