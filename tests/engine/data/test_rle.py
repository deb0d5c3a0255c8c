"""Run-length codes: both forms mean what pycocotools reads in them, and damage is found in the right one of many."""

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from fbn_plugin.engine.data import rle
from fbn_plugin.engine.data.rle import CodeError, check_codes, compressed, without_empty_runs


def codes(number=200, seed=0):
    """Compressed codes of masks of all densities, the same as lists, and the masks."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(number):
        mask = (rng.random(rng.integers(1, 60, 2)) < rng.choice([0, 0.05, 0.5, 0.95, 1])).astype(np.uint8)
        flat = mask.ravel(order="F")
        edges = np.concatenate([[0], np.flatnonzero(np.diff(np.concatenate([[0], flat]))), [flat.size]])
        found.append((mask_utils.encode(np.asfortranarray(mask))["counts"], np.diff(edges).tolist(), mask))
    return [list(each) for each in zip(*found)]


@pytest.mark.parametrize("at_once", [1, 50, 500_000])
def test_codes_of_masks_are_sound(monkeypatch, at_once):
    monkeypatch.setattr(rle, "_AT_ONCE", at_once)
    short, long, masks = codes()
    pixels = [mask.size for mask in masks]
    mixed = [pair[i % 2] for i, pair in enumerate(zip(short, long))]
    for given in (short, long, mixed):
        assert not check_codes(given, pixels).any()
        for wrong in (0, 1, 77, 199):
            changed = [size + (i == wrong) for i, size in enumerate(pixels)]
            with pytest.raises(CodeError, match=f"runs that add up to {pixels[wrong]}") as error:
                check_codes(given, changed)
            assert error.value.index == wrong


def test_lengths_are_pycocotools():
    short, long, masks = codes()
    for code, lengths, mask in zip(short, long, masks):
        assert without_empty_runs(code) == lengths == without_empty_runs(lengths)
        assert compressed(lengths, mask.shape) == code.decode()


@pytest.mark.parametrize("seed", range(3))
def test_a_changed_character_is_found_or_is_another_mask_of_the_size(seed):
    """What passes is decoded by pycocotools, and has as many pixels."""
    rng = np.random.default_rng(seed)
    short, _, masks = codes(100, seed)
    passed = 0
    for code, mask in zip(short, masks):
        changed = bytearray(code)
        changed[rng.integers(len(changed))] = rng.integers(40, 120)
        try:
            check_codes([bytes(changed)], [mask.size])
        except CodeError:
            continue
        passed += 1
        assert mask_utils.decode({"size": list(mask.shape), "counts": bytes(changed)}).shape == mask.shape
    assert passed < 50


@pytest.mark.parametrize(
    "lengths, expected",
    [
        ([5, 0, 5], [10]),
        ([0, 0, 5, 5], [5, 5]),
        ([0, 5, 0, 5], [0, 10]),
        ([5, 5, 0], [5, 5]),
        ([0, 4, 0, 0, 3, 3], [0, 4, 3, 3]),
        ([1, 0, 0, 0, 2, 7], [3, 7]),
        ([2, 3, 5], [2, 3, 5]),
    ],
)
def test_empty_runs(lengths, expected):
    """A mask is the same without them, but pycocotools compares two masks with one as if they ended there."""
    empty = len(lengths) > 1 and 0 in lengths[1:]
    assert check_codes([lengths, [10]], [10, 10]).tolist() == [empty, False]
    assert without_empty_runs(lengths) == expected
    both = [mask_utils.frPyObjects({"size": [2, 5], "counts": each}, 2, 5) for each in (lengths, expected)]
    assert np.array_equal(mask_utils.decode(both[0]), mask_utils.decode(both[1]))


@pytest.mark.parametrize(
    "code, reason",
    [
        (b"", "no run"),
        ([], "no run"),
        (b"z", "a character that no code has"),
        (b"0 0", "a character that no code has"),
        (b"0\x00", "a character that no code has"),
        (b"\xff", "a character that no code has"),
        (b"P", "an end in the middle of a run"),
        (b"5P", "an end in the middle of a run"),
        (b"PPPPPP1", "a run of more than 30 bits"),
        (b"PPPPP1", "a run longer than that"),
        (b"O", "a run of negative length, -1"),
        ([-1, 11], "a run of negative length, -1"),
        ([11, -1], "a run of negative length, -1"),
        ([2**62] * 4, "a run longer than that"),
        ([2**64], "no whole number"),
        ([5.0, 5], "no whole number"),
        ([False, 10], "no whole number"),
        ([None], "no whole number"),
        ([[10]], "no whole number"),
    ],
)
def test_damage(code, reason):
    with pytest.raises(CodeError, match=reason) as error:
        check_codes([[10], b":", code, b":", [10]], [10] * 5)
    assert error.value.index == 2
