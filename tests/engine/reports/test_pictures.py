"""Pictures of detections: what is drawn where, whatever the image's size, and where labels go."""

import io
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from fbn_plugin.engine.data.named_sets import resolve_dataset
from fbn_plugin.engine.reports import pictures
from fbn_plugin.engine.run.cli import UserError

TOP, LEFT = 34 + 22, 12  # of the first image in the picture


@pytest.fixture
def make(tmp_path):
    """A set of one white image with the given objects; returns it."""

    def build(size, *annotations, names=("cat", "dog")):
        Image.new("RGB", size, "white").save(tmp_path / "0.png")
        content = {
            "images": [{"id": 0, "file_name": "0.png", "width": size[0], "height": size[1]}],
            "annotations": [{"id": i, "image_id": 0, "category_id": 1, **each} for i, each in enumerate(annotations)],
            "categories": [{"id": i, "name": name} for i, name in enumerate(names, start=1)],
        }
        (tmp_path / "val.json").write_text(json.dumps(content))
        return resolve_dataset(f"{tmp_path}:val")

    return build


def square(x, y, side, **more):
    polygon = [x, y, x + side, y, x + side, y + side, x, y + side]
    return {"bbox": [x, y, side, side], "segmentation": [polygon], **more}


def draw(data, detections=None, **options):
    png = pictures.draw_detections(data, detections or {}, data.images, **options)
    return np.asarray(Image.open(io.BytesIO(png))).astype(int)


@pytest.mark.parametrize("scale", [0.125, 1, 5])
def test_a_mask_and_a_box_are_where_the_object_is(make, scale):
    data = make((round(640 * scale), round(480 * scale)), square(240 * scale, 160 * scale, 160 * scale))
    picture = draw(data)
    assert picture.shape == (34 + 22 + 480 + 12, 640 + 24, 3)
    image = picture[TOP : TOP + 480, LEFT : LEFT + 640]
    color = np.array(pictures._color(0))
    assert np.abs(image[240, 320] - (0.6 * 255 + 0.4 * color)).max() <= 1  # the mask is see-through
    assert (image[240, 240] == color).all() and (image[161, 320] == color).all()
    assert (image[320:, :230] == 255).all() and (image[330:] == 255).all()


def test_a_crowd_is_hatched(make):
    plain, crowd = (
        draw(make((640, 480), square(100, 100, 200, iscrowd=n)))[TOP + 130 : TOP + 290, 130:290] for n in (0, 1)
    )
    tinted = [(image != 255).any(axis=2).mean() for image in (plain, crowd)]
    assert tinted[0] == 1 and 0.3 < tinted[1] < 0.45


def test_what_scores_too_little_is_left_out(make):
    data = make((640, 480))
    found = [{"image_id": 0, "category_id": 2, "bbox": [50, 50, 90, 90], "score": score} for score in (0.3, 0.6)]
    none, one = (draw(data, {"run": found[: count + 1]}) for count in (0, 1))
    other = slice(LEFT + 640 + 12, None)
    assert (none[TOP : TOP + 480, other] == 255).all()
    assert (one[TOP : TOP + 480, other] == pictures._color(1)).all(axis=2).any()


def test_labels_stay_inside_and_apart():
    size, taken = (200, 100), []
    for _ in range(50):
        place = pictures._place((150, 2, 190, 30), (60, 16), size, taken)
        if place is None:
            break
        assert place[0] >= 0 and place[1] >= 0 and place[2] <= size[0] and place[3] <= size[1]
        assert all(place[0] >= o[2] or o[0] >= place[2] or place[1] >= o[3] or o[1] >= place[3] for o in taken)
        taken.append(place)
    assert 2 <= len(taken) <= 8
    assert pictures._place((0, 0, 10, 10), (300, 16), size, []) is None


def test_a_caption_counts_what_has_no_label(make, monkeypatch):
    said = []
    text = pictures.ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        pictures.ImageDraw.ImageDraw,
        "text",
        lambda self, at, words, *a: said.append(words) or text(self, at, words, *a),
    )
    draw(make((640, 480), *[square(300, 200, 40)] * 30))
    (caption,) = (each for each in said if each.startswith("0.png"))
    labels = said.count("cat")
    assert 0 < labels < 30 and caption == f"0.png, 640 × 480: 30 objects, {30 - labels} without a label"
    said.clear()
    # One class: its name stands at the top, and scores alone at the objects.
    data = make((640, 480), *[square(300, 200, 40)] * 30, names=["nucleus"])
    draw(data, {"run": [{"image_id": 0, "category_id": 1, "bbox": [9, 90, 90, 90], "score": 0.875}]})
    assert said[-2:] == ["ground truth: nucleus", "run"] and "nucleus" not in said and "88%" in said
    assert "0.png, 640 × 480: 30 objects" in said and "1 detection" in said
    said.clear()
    draw(make((640, 480)), {"run": []})
    assert "0.png, 640 × 480: no objects" in said and "no detections" in said


def test_classes_have_colours_of_their_own():
    colors = [pictures._color(number) for number in range(80)]
    assert len(set(colors)) == 80
    assert min(np.abs(np.subtract(a, b)).max() for a, b in itertools.pairwise(colors)) > 60


def test_images_are_spread_and_found(shapes):
    data = resolve_dataset(f"{shapes}:train")
    assert [image["id"] for image in pictures.spread_images(data, 4)] == [0, 2, 4, 6]
    assert len(pictures.spread_images(data, 99)) == 8
    assert [image["id"] for image in pictures.find_images(data, ["3.png", "5"])] == [3, 5]
    with pytest.raises(ValueError, match=r"has no image '8.png'; its first is '0.png'"):
        pictures.find_images(data, ["8.png"])


def test_an_image_of_another_size_is_one_sentence(make, tmp_path):
    data = make((64, 48))
    Image.new("RGB", (48, 64)).save(tmp_path / "0.png")
    with pytest.raises(UserError, match="48x64, its annotation file says 64x48"):
        draw(data)


def test_long_titles_keep_their_end():
    font = pictures._font(13)
    cut = pictures._fit("/a/long/way/down/" * 9 + "seed3", font, 100)
    assert cut.startswith("…") and cut.endswith("seed3") and font.getlength(cut) <= 100
    assert pictures._fit("FBN", font, 100) == "FBN"
