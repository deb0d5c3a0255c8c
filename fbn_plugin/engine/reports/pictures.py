"""Pictures of detections: for each image a row, the ground truth first and then what each run found, drawn at one scale
whatever the size of the images."""

import colorsys
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from pycocotools import mask as mask_utils

from fbn_plugin.engine.data.coco_data import CocoDataset
from fbn_plugin.engine.data.decoding import read_image
from fbn_plugin.engine.files.words import counted, shown_path
from fbn_plugin.engine.run.cli import UserError

__all__ = ["draw_detections", "find_images", "spread_images"]

_MARGIN = 12
_MASK_OPACITY = 0.4
_INK, _QUIET = (34, 34, 34), (110, 110, 110)


def draw_detections(
    data: CocoDataset,
    detections: Mapping[str, Sequence[dict[str, Any]]],
    images: Sequence[dict[str, Any]],
    threshold: float = 0.5,
    side: int = 640,
) -> bytes:
    """PNG of ground truth and detections side by side.

    A class has one colour in the whole picture; a crowd is hatched. Where there is one class only, its name is not
    repeated at every object. A label that finds no free place is left out, and the caption says how many are.

    Args:
        data: the ground truth.
        detections: title of each column -> detections in COCO's results format, with boxes and perhaps masks.
        images: those of ``data.images`` to draw, a row each.
        threshold: least score of a detection that is drawn.
        side: pixels of an image's long side in the picture.

    Raises:
        UserError: an image cannot be read, or is not of the size that its annotations are for.
    """
    chosen = {image["id"]: {} for image in images}
    for each in data.annotations:
        if each["image_id"] in chosen:
            chosen[each["image_id"]].setdefault("ground truth", []).append(each)
    for title, found in detections.items():
        for each in found:
            if each["image_id"] in chosen and each["score"] >= threshold:
                chosen[each["image_id"]].setdefault(title, []).append(each)
    titles = ["ground truth", *detections]
    rows = [_row(data, image, [chosen[image["id"]].get(title, []) for title in titles], side) for image in images]
    head, font = 34, _font(17, bold=True)
    if len(data.categories) == 1:
        titles[0] += f": {data.class_names[0]}"
    width = len(titles) * (side + _MARGIN) + _MARGIN
    page = Image.new("RGB", (width, head + sum(row.height for row in rows)), "white")
    draw = ImageDraw.Draw(page)
    for column, title in enumerate(titles):
        draw.text((_MARGIN + column * (side + _MARGIN), 8), _fit(title, font, side), _INK, font)
    top = head
    for row in rows:
        page.paste(row, (0, top))
        top += row.height
    buffer = io.BytesIO()
    page.save(buffer, "PNG")
    return buffer.getvalue()


def spread_images(data: CocoDataset, count: int) -> list[dict[str, Any]]:
    """``count`` images, or all if they are fewer, at equal distances through the set."""
    count = min(count, len(data.images))
    return [data.images[number * len(data.images) // count] for number in range(count)]


def find_images(data: CocoDataset, names: Sequence[str]) -> list[dict[str, Any]]:
    """The images of the given file names (without their folders, if that is enough) or ids.

    Raises:
        ValueError: the set has no such image.
    """
    known = {str(image["id"]): image for image in data.images}
    known |= {Path(image["file_name"]).name: image for image in data.images}
    known |= {image["file_name"]: image for image in data.images}
    for name in names:
        if name not in known:
            raise ValueError(f"{data.name} has no image {name!r}; its first is {data.images[0]['file_name']!r}")
    return [known[name] for name in names]


def _row(
    data: CocoDataset, image: Mapping[str, Any], columns: Sequence[Sequence[dict[str, Any]]], side: int
) -> Image.Image:
    path = data.image_root / image["file_name"]
    pixels = read_image(path)
    if pixels.size != (image["width"], image["height"]):
        raise UserError(
            f"image {shown_path(path)} is {pixels.width}x{pixels.height}, its annotation file says "
            f"{image['width']}x{image['height']}"
        )
    scale = side / max(pixels.size)
    size = tuple(max(1, round(length * scale)) for length in pixels.size)
    pixels = pixels.resize(size, Image.Resampling.LANCZOS)
    font, caption_height = _font(13), 22
    row = Image.new("RGB", (len(columns) * (side + _MARGIN) + _MARGIN, caption_height + size[1] + _MARGIN), "white")
    draw = ImageDraw.Draw(row)
    for column, objects in enumerate(columns):
        left = _MARGIN + column * (side + _MARGIN)
        drawn, unlabelled = _draw(data, image, pixels, objects)
        row.paste(drawn, (left, caption_height))
        what = "detection" if column else "object"
        caption = counted(len(objects), what) if objects else f"no {what}s"
        if unlabelled:
            caption += f", {unlabelled} without a label"
        if not column:
            name = f"{Path(image['file_name']).name}, {image['width']} × {image['height']}"
            name = _fit(name, font, side - font.getlength(f": {caption}"))
            caption = f"{name}: {caption}"
        draw.text((left, 3), caption, _QUIET, font)
    return row


def _draw(
    data: CocoDataset, image: Mapping[str, Any], pixels: Image.Image, objects: Sequence[dict[str, Any]]
) -> tuple[Image.Image, int]:
    """The objects on the resized image, and how many have no label for want of room."""
    classes = {key: (number, data.class_names[number]) for number, key in enumerate(data.category_ids)}
    canvas = np.array(pixels, dtype=np.float32)
    size, scale = (image["height"], image["width"]), pixels.width / image["width"]
    for each in sorted(objects, key=lambda each: -each["bbox"][2] * each["bbox"][3]):  # the small ones on top
        if "segmentation" in each:
            inside, edge = _mask(each["segmentation"], size, pixels.size)
            if each.get("iscrowd"):
                inside &= np.add.outer(*map(np.arange, inside.shape)) % 8 < 3
            color = np.array(_color(classes[each["category_id"]][0]))
            canvas[inside] += _MASK_OPACITY * (color - canvas[inside])
            canvas[edge] = color
    drawn = Image.fromarray(canvas.round().astype(np.uint8))
    draw = ImageDraw.Draw(drawn)
    corners = []
    for each in objects:
        x, y, width, height = (value * scale for value in each["bbox"])
        corners.append((x, y, max(x, min(x + width, pixels.width) - 1), max(y, min(y + height, pixels.height) - 1)))
        draw.rectangle(corners[-1], outline=_color(classes[each["category_id"]][0]), width=2)
    font, taken, unlabelled = _font(12, bold=True), [], 0
    # The surest, or largest, first.
    for each, box in sorted(zip(objects, corners), key=lambda pair: -pair[0].get("score", pair[0]["bbox"][2])):
        number, name = classes[each["category_id"]]
        words = [name] if len(classes) > 1 else []
        if "score" in each:
            words.append(f"{each['score']:.0%}")
        elif each["iscrowd"]:
            words.append("(crowd)")
        if not words:
            continue
        text = " ".join(words)
        place = _place(box, (font.getlength(text) + 6, 16), pixels.size, taken)
        if place is None:
            unlabelled += 1
            continue
        taken.append(place)
        color = _color(number)
        draw.rectangle(place, fill=color)
        bright = np.dot(color, (0.299, 0.587, 0.114)) > 140
        draw.text((place[0] + 3, place[1] + 1), text, "black" if bright else "white", font)
    return drawn, unlabelled


def _place(
    box: Sequence[float], label: tuple[float, float], size: tuple[int, int], taken: Sequence[tuple]
) -> tuple[float, float, float, float] | None:
    """A free place for a label at a box: above it, in its corners, below it; None if there is none."""
    left, top, right, bottom = box
    width, height = label
    lefts = [min(max(x, 0), max(size[0] - width, 0)) for x in (left, right - width)]
    for y in (top - height, top, bottom - height, bottom):
        for x in lefts:
            place = (x, y, x + width, y + height)
            fits = y >= 0 and place[3] <= size[1] and width <= size[0]
            if fits and not any(
                place[0] < o[2] and o[0] < place[2] and place[1] < o[3] and o[1] < place[3] for o in taken
            ):
                return place
    return None


def _mask(segmentation: list | dict, size: tuple[int, int], new_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Inside and edge (H', W') bool of a polygon or RLE mask of an image (height, width), at (width', height')."""
    if isinstance(segmentation, list):
        segmentation = mask_utils.merge(mask_utils.frPyObjects(segmentation, *size))
    elif isinstance(segmentation["counts"], list):
        segmentation = mask_utils.frPyObjects(segmentation, *size)
    mask = Image.fromarray(mask_utils.decode(segmentation) * 255).resize(new_size, Image.Resampling.BILINEAR)
    inside = np.asarray(mask) >= 128
    eroded = Image.fromarray(inside.astype(np.uint8)).filter(ImageFilter.MinFilter(3))
    return inside.copy(), inside & (np.asarray(eroded) == 0)


def _color(number: int) -> tuple[int, int, int]:
    """A colour for each class, far from those of the classes beside it."""
    hue = (0.08 + number * 0.618034) % 1
    return tuple(round(255 * value) for value in colorsys.hls_to_rgb(hue, (0.48, 0.62, 0.38)[number % 3], 0.85))


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    import matplotlib  # for its fonts, which have far more letters than Pillow's own

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", name), size)


def _fit(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, its beginning cut where it is too long: what tells folders and files apart stands at the end."""
    cut = text
    while text and font.getlength(cut) > width:
        text = text[1:]
        cut = f"…{text}"
    return cut
