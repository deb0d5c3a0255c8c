"""Image files with changed bytes: each becomes an RGB image or is refused in one sentence. Other seeds:
``python tests/sweeps/test_images.py SEED COUNT`` from the project's folder, with ``tests`` on PYTHONPATH."""

import io
import random
import struct
import sys
import zlib

import numpy as np
from limited_process import Outcome, assert_sound, outcomes
from PIL import Image, features

from fbn_plugin.engine.data.decoding import decode_image
from fbn_plugin.engine.run.cli import UserError

COUNT = 240


def _saved(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def originals() -> list[tuple[str, bytes]]:
    """Small images in the formats and kinds that are read."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8))
    grey, deep = colour.convert("L"), Image.fromarray(rng.integers(0, 2**16, (20, 30), np.uint16))
    exif = Image.Exif()
    exif.update({0x0112: 6, 0x010F: "maker", 0x011A: 72.0})
    frames = {"save_all": True, "append_images": [colour.rotate(90), grey.convert("RGB")]}
    made = [
        ("JPEG", _saved(colour, "JPEG", exif=exif)),
        ("JPEG", _saved(colour, "JPEG", progressive=True, subsampling=0)),
        ("JPEG", _saved(colour.convert("CMYK"), "JPEG")),
        ("MPO", _saved(colour, "MPO", **frames)),
        ("PNG", _saved(colour, "PNG", exif=exif, dpi=(72, 72))),
        ("PNG", _saved(colour.quantize(16), "PNG", transparency=bytes(range(16)))),
        ("PNG", _saved(deep, "PNG")),
        ("PNG", _saved(colour, "PNG", **frames)),
        ("GIF", _saved(colour.quantize(200), "GIF", **frames)),
        ("BMP", _saved(colour, "BMP")),
        ("BMP", _saved(grey.convert("1"), "BMP")),
        *(("TIFF", _saved(colour, "TIFF", compression=each, exif=exif)) for each in (None, "tiff_lzw", "jpeg")),
        ("TIFF", _saved(deep, "TIFF", compression="tiff_adobe_deflate")),
        ("TIFF", _saved(grey.convert("1"), "TIFF", compression="group4")),
        ("WEBP", _saved(colour, "WEBP", exif=exif)),
        ("WEBP", _saved(colour.convert("RGBA"), "WEBP", lossless=True)),
        ("WEBP", _saved(colour, "WEBP", **frames)),
        ("PPM", _saved(colour, "PPM")),
        ("PPM", b"P2\n4 3\n300\n" + b" 200" * 12),
    ]
    optional = (("JPEG2000", "jpg_2000", colour), ("AVIF", "avif", colour))
    return made + [(name, _saved(image, name)) for name, feature, image in optional if features.check(feature)]


def mutated(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """One of the ways in which a file is damaged, or made to do damage."""
    data = bytearray(data)
    kind = rng.randrange(7)
    if kind == 0:  # bytes flipped anywhere
        for _ in range(rng.randint(1, 12)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == 1:  # near the beginning, where sizes are
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(min(64, len(data)))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    elif kind == 2:
        del data[rng.randrange(len(data)) :]
    elif kind == 3:  # a stretch of another file within
        start, length = rng.randrange(len(other)), rng.randint(1, 200)
        place = rng.randrange(len(data))
        data[place : place + rng.choice((0, length))] = other[start : start + length]
    elif kind == 4:  # a count or a size becomes a large or an odd one
        place = rng.randrange(max(1, min(400, len(data) - 4)))
        number = rng.choice((0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, rng.getrandbits(32)))
        data[place : place + 4] = struct.pack(rng.choice("<>") + "I", number)
    elif kind == 5:
        data = bytearray(_with_sound_checksums(data, rng)) if data[1:4] == b"PNG" else _with_exif(data, rng)
    else:  # a stretch that comes again
        start = rng.randrange(len(data))
        piece = data[start : start + rng.randint(1, 100)]
        data[start:start] = piece * rng.randint(1, 50)
    return bytes(data)


def _with_sound_checksums(data: bytearray, rng: random.Random) -> bytes:
    """A PNG with one chunk changed, moved or invented, so that no checksum refuses it."""
    chunks, place = [], 8
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        chunks.append((bytes(data[place + 4 : place + 8]), data[place + 8 : place + 8 + length]))
        place += 12 + length
    if not chunks:  # cut short before
        return bytes(data)
    name, content = chunks[chosen := rng.randrange(len(chunks))]
    if content and rng.random() < 0.6:
        content[rng.randrange(len(content))] = rng.randrange(256)
    elif rng.random() < 0.5:
        chunks.insert(rng.randrange(len(chunks) + 1), chunks[chosen])
    else:
        name = rng.choice((b"tRNS", b"PLTE", b"zTXt", b"iCCP", b"eXIf", b"acTL", b"fcTL", b"fdAT", b"iTXt", b"pHYs"))
        content = rng.randbytes(rng.randrange(60))
        chunks.insert(rng.randrange(1, len(chunks) + 1), (name, content))
    chunks[chosen] = (chunks[chosen][0], content) if name == chunks[chosen][0] else chunks[chosen]
    packed = (struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + bytes(c))) for n, c in chunks)
    return bytes(data[:8]) + b"".join(packed)


def random_exif(rng: random.Random) -> bytes:
    """A block with an orientation among entries of random tags, types, counts and places."""
    order = rng.choice("<>")
    entries = [struct.pack(order + "HHIHH", 0x0112, rng.choice((3, 3, 3, 4, rng.randrange(20))), 1, 6, 0)]
    for _ in range(rng.randint(0, 6)):
        tag = rng.choice((0x011A, 0x011B, 0x0128, 0x010E, 0x8769, 0x8825, 0xA005, 0x927C, rng.getrandbits(16)))
        count = rng.choice((0, 1, 2, 4, 8, 0xFFFF, rng.getrandbits(32)))
        entries.append(struct.pack(order + "HHI", tag, rng.randrange(20), count) + rng.randbytes(4))
    rng.shuffle(entries)
    start = b"II*\0" if order == "<" else b"MM\0*"
    count = rng.choice((len(entries), len(entries), rng.getrandbits(16)))
    block = start + struct.pack(order + "IH", 8, count) + b"".join(entries) + b"\0\0\0\0" + rng.randbytes(20)
    return b"Exif\0\0" + (block if rng.random() < 0.8 else block[: rng.randrange(len(block))])


def _with_exif(data: bytearray, rng: random.Random) -> bytes:
    """A JPEG with such a block before all else; of other files the same with random bytes."""
    block = random_exif(rng)
    start = b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block
    return bytes(data[:2] + start + data[2:] if data[:2] == b"\xff\xd8" else data[:12] + block + data[12:])


def cases(seed: int, count: int) -> list[tuple[str, bytes]]:
    rng, sound = random.Random(seed), originals()
    made = []
    for number in range(count):
        name, data = sound[number % len(sound)]
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            data = mutated(data, rng.choice(sound)[1], rng) if data else data
        made.append((name, data))
    return made


def read(case: tuple[str, bytes]) -> str:
    try:
        image = decode_image(io.BytesIO(case[1]), "x")
    except UserError as error:
        assert "image x" in str(error)
        raise
    assert image.mode == "RGB" and min(image.size) > 0 and not image.info
    image.getpixel((image.width - 1, image.height - 1))
    return f"{image.width}x{image.height}"


def swept(seed: int, count: int, mebibytes: int = 1500) -> tuple[list[tuple[str, bytes]], list[Outcome]]:
    made = cases(seed, count)
    return made, outcomes(read, made, (UserError,), seconds=20, mebibytes=mebibytes)


def test_changed_images_are_read_or_refused():
    made, ended = swept(0, COUNT)
    assert_sound(ended, made, lambda case: f"{case[0]} {case[1].hex()}")
    kinds = [each.kind for each in ended]
    assert kinds.count("done") > COUNT / 10 and kinds.count("refused") > COUNT / 4


def test_odd_exif_stops_no_photo():
    rng, photo = random.Random(0), originals()[0][1]
    made = [("JPEG", _with_exif(bytearray(photo), rng)) for _ in range(COUNT)]
    ended = outcomes(read, made, (UserError,))
    assert {each.kind for each in ended} == {"done"}
    assert {each.text for each in ended} == {"30x20", "20x30"}


def main() -> None:
    seed, count = int(sys.argv[1]), int(sys.argv[2])
    made, ended = swept(seed, count)
    kinds = [each.kind for each in ended]
    print({kind: kinds.count(kind) for kind in sorted(set(kinds))})
    assert_sound(ended, made, lambda case: f"{case[0]} {case[1].hex()}")


if __name__ == "__main__":
    main()
