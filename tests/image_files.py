"""Image files that are sound, odd or hostile, for the tests of what reads them: classification and both detectors."""

import io
import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

WIDTH, HEIGHT = 8, 6
_RNG = np.random.default_rng(0)
PIXELS = _RNG.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
COLOUR = Image.fromarray(PIXELS)
GREY = COLOUR.convert("L")
DEEP = _RNG.integers(0, 2**16, (HEIGHT, WIDTH, 3)).astype(">u2")
DEEP_GREY = Image.fromarray(DEEP[..., 0].astype(np.uint16))


def saved(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, kind: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of these sizes, whatever it holds."""
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    parts = (b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )


def exif(*entries: tuple[int, int, int, bytes], order: str = "<") -> bytes:
    """A block of EXIF data.

    Args:
        entries: tag, type, count and value of four bytes of each.
    """
    packed = b"".join(struct.pack(order + "HHI", *entry[:3]) + entry[3] for entry in entries)
    start = b"II*\0" if order == "<" else b"MM\0*"
    return b"Exif\0\0" + start + struct.pack(order + "IH", 8, len(entries)) + packed + b"\0\0\0\0"


def orientation(value: int, kind: int = 3, order: str = "<") -> tuple[int, int, int, bytes]:
    return 0x0112, kind, 1, struct.pack(order + ("HH" if kind == 3 else "I"), *([value, 0] if kind == 3 else [value]))


def taken_in(value: int) -> bytes:
    """A PNG (no loss) that says it was taken in an orientation."""
    return saved(COLOUR, exif=exif(orientation(value)))


def upper_bits(values: np.ndarray) -> np.ndarray:
    return np.broadcast_to((values >> 8).astype(np.uint8).reshape(HEIGHT, WIDTH, -1), (HEIGHT, WIDTH, 3))


def _lab() -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.applyTransform(COLOUR, ImageCms.buildTransform(*profiles, "RGB", "LAB"))


def _scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes ``count`` times more."""
    data = saved(COLOUR, "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * count + b"\xff\xd9"


def _of_pillow(data: bytes) -> np.ndarray:
    """What Pillow makes of a file by itself, for the kinds that it reads without loss or doubt."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


_FRAMES = {"save_all": True, "append_images": [COLOUR.rotate(180)]}
_PALETTE = COLOUR.quantize(8)
_TEXT = b"x\0\0" + zlib.compress(b"a" * 2**21)

# Files that are read, and the pixels; without these they are as Pillow has them.
READ: dict[str, tuple[bytes, np.ndarray | None]] = {
    "colour": (saved(COLOUR), PIXELS),
    "grey": (saved(GREY), None),
    "one_bit": (saved(COLOUR.convert("1")), None),
    "grey_and_alpha": (saved(COLOUR.convert("LA")), None),
    "colour_and_alpha": (saved(COLOUR.convert("RGBA")), PIXELS),
    "palette": (saved(_PALETTE), None),
    "palette_with_transparency": (saved(_PALETTE, transparency=bytes(range(8))), np.asarray(_PALETTE.convert("RGB"))),
    "transparent_colour": (saved(COLOUR, transparency=tuple(map(int, PIXELS[0, 0]))), PIXELS),
    "jpeg": (saved(COLOUR, "JPEG"), None),
    "progressive_jpeg": (saved(COLOUR, "JPEG", progressive=True), None),
    "cmyk": (saved(COLOUR.convert("CMYK"), "JPEG"), None),
    "ycbcr": (saved(COLOUR.convert("YCbCr"), "TIFF"), None),
    "lab": (saved(_lab(), "TIFF"), None),
    "bmp": (saved(COLOUR, "BMP"), PIXELS),
    "ppm": (saved(COLOUR, "PPM"), PIXELS),
    "webp": (saved(COLOUR, "WEBP", lossless=True), PIXELS),
    "tiff": (saved(COLOUR, "TIFF"), PIXELS),
    "tiff_turned": (saved(COLOUR, "TIFF", tiffinfo={0x0112: 6}), np.rot90(PIXELS, -1)),
    "first_page": (saved(COLOUR, "TIFF", **_FRAMES), PIXELS),
    "first_of_apng": (saved(COLOUR, **_FRAMES), PIXELS),
    "first_of_gif": (saved(_PALETTE, "GIF", **_FRAMES), np.asarray(_PALETTE.convert("RGB"))),
    "first_of_mpo": (saved(COLOUR, "MPO", **_FRAMES), None),
    "first_of_webp": (saved(COLOUR, "WEBP", lossless=True, **_FRAMES), PIXELS),
    "deep_grey": (saved(DEEP_GREY), upper_bits(DEEP[..., 0])),
    "deep_grey_tiff": (saved(DEEP_GREY, "TIFF"), upper_bits(DEEP[..., 0])),
    "deep_grey_big_endian": (
        saved(Image.frombytes("I;16B", (WIDTH, HEIGHT), DEEP[..., 0].tobytes()), "TIFF"),
        upper_bits(DEEP[..., 0]),
    ),
    "deep_grey_pgm": (b"P5 8 6 65535\n" + DEEP[..., 0].tobytes(), upper_bits(DEEP[..., 0])),
    "pgm_of_12_bits": (b"P2 8 6 4095\n" + b"4095 " * 48, np.full((HEIGHT, WIDTH, 3), 255, np.uint8)),
    "deep_black": (saved(Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint16))), np.zeros_like(PIXELS)),
    "deep_colour": (png(WIDTH, HEIGHT, 16, 2, b"".join(b"\0" + row.tobytes() for row in DEEP)), upper_bits(DEEP)),
    "turned_with_odd_tag": (
        saved(COLOUR, exif=exif(orientation(6), (0x011A, 2, 4, b"72\0\0"))),  # a resolution that is text
        np.rot90(PIXELS, -1),
    ),
    "jpeg_turned_with_odd_tag": (
        saved(Image.new("RGB", (8, 6), "white"), "JPEG", exif=exif(orientation(6), (0x011A, 2, 4, b"72\0\0"))),
        np.full((WIDTH, HEIGHT, 3), 255, np.uint8),
    ),
}

# Files that are refused, and words of the sentence.
REFUSED: dict[str, tuple[bytes, str]] = {
    "png_with_huge_text": (png(WIDTH, HEIGHT, 8, 2, b"", (b"zTXt", _TEXT)), "MAX_TEXT_CHUNK"),
    "png_of_60000_squared": (png(60000, 60000, 8, 2, bytes(1000)), "60000x60000"),
    "large_gif": (b"GIF89a" + b"\xff" * 4 + bytes(3) + b"," + bytes(4) + b"\xff" * 4 + bytes(9), "MAX_IMAGE_PIXELS"),
    "no_width": (png(0, 5, 8, 2, b""), "no pixels"),
    "no_height": (b"P6 5 0 255\n", "no pixels"),
    "integers": (saved(Image.fromarray(DEEP[..., 0].astype(np.int32)), "TIFF"), "32-bit integers"),
    "floats": (saved(Image.fromarray(DEEP[..., 0].astype(np.float32)), "TIFF"), "floating-point"),
    "twelve_bits": (
        saved(Image.fromarray((DEEP[..., 0] >> 4).astype(np.uint16))),
        f"{DEEP[..., 0].max() >> 4} of 65535",
    ),
    "cut_png": (saved(COLOUR)[:100], "truncated"),
    "cut_jpeg": (saved(COLOUR, "JPEG")[:-60], "Truncated"),
    "many_scans": (_scans(200), "scans"),
    "unfinished_header": (b"P6 80 x 255 ", "cannot be read"),
    "empty": (b"", "it is empty"),
    "text": (b"no image", "no image"),
    "web_page": (b"\n<!DOCTYPE html><p>404", "a web page"),
    "git_lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 6\n%%EndComments\n", "PostScript"),
    "pdf": (b"%PDF-1.4", "PDF"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
    "heif": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIF"),
    "icon": (saved(COLOUR, "ICO"), "an icon"),
}


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = os.getcwd()
        os.chdir(path.parent)  # the name of a socket may be short only
        try:
            made.bind(path.name)
        finally:
            os.chdir(here)


# What is no file: how it is made, and words of the sentence.
NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder": (Path.mkdir, "a folder"),
    "pipe": (os.mkfifo, "a pipe"),
    "socket": (_socket, "a pipe, socket"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "device"),
    "link_to_nothing": (lambda path: path.symlink_to("nothing"), "not there"),
    "link_to_itself": (lambda path: path.symlink_to(path), "symbolic links"),
    "nothing": (lambda path: None, "not there"),
}
