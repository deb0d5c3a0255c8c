"""The one reader of image files, for classification and detection alike: which formats it reads, how it makes 8-bit
pixels of them, and one sentence for each file that is no image, too large, or damaged.

EXIF orientation: CIPA DC-008 (Exif 2.3), 4.6.4, tag 274; in XMP: Adobe XMP Specification Part 2, tiff:Orientation.
"""

import contextlib
import errno
import functools
import os
import re
import stat
import struct
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from fbn_plugin.engine.files.words import shown_path
from fbn_plugin.engine.run.cli import UserError, error_sentence

__all__ = [
    "FORMATS",
    "BrokenImageError",
    "decode_image",
    "enough_memory",
    "image_extensions",
    "read_image",
    "read_label_map",
]

# Pillow's names, the frequent ones first. No loader of another format is asked: that of EPS runs a program.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF")

# What else is found under the names of images, by its first bytes.
_OTHERS = (
    (rb"version https://git-lfs", "a pointer of Git LFS, whose file was not downloaded"),
    (rb"\s*(<!doctype html|<html)", "a web page"),
    (rb"\s*(<\?xml|<svg)", "SVG or other XML"),
    (rb"%PDF", "PDF"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript"),
    (rb"....ftyp(heic|heix|hevc|heim|heis|mif1|msf1)", "HEIF"),
    (rb"8BPS", "a Photoshop file"),
    (rb"\x00\x00\x01\x00", "an icon"),
    (rb"PK\x03\x04", "a zip archive"),
    (rb"\x1f\x8b", "a gzip file"),
    (rb"\x89HDF", "HDF5"),
    (rb"\x93NUMPY", "a NumPy array"),
    (rb"SIMPLE  =", "FITS"),
    (rb".{128}DICM", "DICOM"),
)

# A scan of a few bytes takes as long as the whole picture has pixels; encoders write some ten.
_MOST_SCANS = 100

# What turns an image upright that was taken in each orientation; 1 is upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112


class BrokenImageError(UserError):
    """What is wrong lies in the file's content, and not in the disk or the memory: it is so each time."""


def read_image(path: str | os.PathLike, mode: str = "RGB") -> Image.Image:
    """An image file with 8 bits a channel, turned as its EXIF data say; see :func:`decode_image`.

    Args:
        path: of a file; what is none, such as a pipe, is not opened.
        mode: PIL mode of the result.

    Raises:
        UserError: one sentence with the path.

    Examples::

        >>> Image.new("L", (4, 3)).save("grey.png")
        >>> read_image("grey.png")
        <PIL.Image.Image image mode=RGB size=4x3 at ...>
    """
    with _open(path) as file:
        return decode_image(file, os.fspath(path), mode)


def read_label_map(path: str | os.PathLike) -> Image.Image:
    """An image file whose pixels are numbers of classes from 0 to 255, in mode ``"L"``; UserError as of
    :func:`read_image`. Of 16 bits a channel the lower 8 are meant here, and the others must be 0.
    """
    who = f"image {shown_path(path)}"
    with _open(path) as file, enough_memory(path):
        image = _load(file, who)
        if _is_deep(image):
            values = np.asarray(image)
            if image.mode == "F" or not 0 <= values.min() <= values.max() <= 255:
                kind = "floating-point numbers" if image.mode == "F" else "integers"
                raise UserError(f"{who} must hold numbers of classes from 0 to 255, got {kind} up to {values.max()}")
            image = _with_info(Image.fromarray(values.astype(np.uint8)), image)
        return _upright(image, "L", who)


def decode_image(file: BinaryIO, name: str | os.PathLike, mode: str = "RGB") -> Image.Image:
    """The first picture of an image file, turned as its EXIF or XMP data say.

    Of 16 bits a channel the upper 8 are taken, in grey as Pillow does in colour. Transparency is left out.

    Args:
        file: open for reading bytes, at its beginning; one that can seek.
        name: what errors call it.
        mode: PIL mode of the result.

    Raises:
        BrokenImageError: no image of one of ``FORMATS``; damaged, without pixels, or of more than twice Pillow's
            ``MAX_IMAGE_PIXELS``; 32-bit integers or floating-point numbers, of which nothing says what is white; grey
            of 16 bits of which the upper 4 are not used.
    """
    who = f"image {shown_path(name)}"
    with enough_memory(name):
        image = _load(file, who)
        if _is_deep(image):
            image = _with_info(_upper_bits(image, who), image)
        return _upright(image, mode, who)


@functools.cache
def image_extensions() -> frozenset[str]:
    """How the names of image files end, in lower case with the dot: those of ``FORMATS`` that this Pillow reads."""
    Image.init()
    known = Image.registered_extensions().items()
    return frozenset(extension for extension, format_ in known if format_ in (*FORMATS, "MPO") and extension != ".pfm")


@contextlib.contextmanager
def enough_memory(name: str | os.PathLike) -> Iterator[None]:
    """Say of which image the computation within has not had the memory; UserError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise UserError(f"image {shown_path(name)} needs more memory than there is") from None


@contextlib.contextmanager
def _open(path: str | os.PathLike) -> Iterator[BinaryIO]:
    who = f"image {shown_path(path)}"
    try:
        mode = os.stat(path).st_mode
        # A pipe would be waited for without end, and a device may do something when it is opened.
        if not stat.S_ISREG(mode):
            what = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
            raise UserError(f"{who} is {what}, not a file")
        file = open(path, "rb")  # noqa: SIM115 (closed below, where its errors are others)
    except FileNotFoundError:
        raise UserError(f"{who} is not there") from None
    except OSError as error:
        raise UserError(f"{who} cannot be read: {error.strerror}") from None
    except ValueError as error:  # a zero byte, or half of a character
        raise UserError(f"{who} cannot be read: no file has such a name ({error})") from None
    with file:
        yield file


@contextlib.contextmanager
def _pillow(who: str) -> Iterator[None]:
    """Answer whatever Pillow or the disk raises by one sentence. Which errors these are depends on the format and the
    damage: such files have led to most types that Python has, and no list of them has been whole."""
    try:
        yield
    except MemoryError:
        raise
    except Image.DecompressionBombError:
        raise _too_large(who, "") from None
    except Exception as error:
        # Pillow's own have no number; a file is refused a place before its beginning by EINVAL.
        of_disk = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
        kind = UserError if of_disk else BrokenImageError
        reason = " ".join(error_sentence(error).split())
        if reason == "not identified by this driver":  # of any format
            reason = "it has no pixels, or none of a known kind"
        elif not isinstance(error, OSError | ValueError | SyntaxError):  # a KeyError says the key alone
            reason = f"{type(error).__name__} {reason}"
        raise kind(f"{who} cannot be read: {reason.strip() or type(error).__name__}") from None


def _load(file: BinaryIO, who: str) -> Image.Image:
    """The file's first picture, as Pillow has it."""
    with _pillow(who):
        beginning = file.read(132)
        file.seek(0)
    name = _format(beginning, who)
    # A JPEG as such, though pictures may follow: their index is often damaged.
    factory = JpegImageFile if name == "JPEG" else Image.OPEN[name][0]
    # Not by Image.open: its two bounds are a warning and an error, and in its place Ultralytics puts a function that
    # installs a package where an image is damaged.
    with _pillow(who):
        image = factory(file, "")
    width, height = image.size
    if Image.MAX_IMAGE_PIXELS is not None and width * height > 2 * Image.MAX_IMAGE_PIXELS:
        raise _too_large(who, f": it is {width}x{height}")
    if "progressive" in image.info:
        _check_scans(file, who)
    with _pillow(who):
        image.load()
    return image


@functools.cache
def _readable() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _format(beginning: bytes, who: str) -> str:
    """Pillow's name of the format that a file is of by its first bytes."""
    for name in _readable():
        if Image.OPEN[name][1](beginning[:16]) is True:
            return name
    if not beginning:
        raise BrokenImageError(f"{who} cannot be read: it is empty")
    others = (what for pattern, what in _OTHERS if re.match(pattern, beginning, re.DOTALL | re.IGNORECASE))
    what = next(others, f"of no known format, and begins with {beginning[:8]!r}")
    raise BrokenImageError(f"{who} cannot be read: it is {what}; what is read is {', '.join(_readable())}")


def _too_large(who: str, size: str) -> BrokenImageError:
    most = 2 * Image.MAX_IMAGE_PIXELS
    return BrokenImageError(f"{who} has more than {most:,} pixels, twice PIL.Image.MAX_IMAGE_PIXELS{size}")


def _check_scans(file: BinaryIO, who: str) -> None:
    """Refuse a progressive JPEG that takes minutes for a few bytes."""
    place = file.tell()
    file.seek(0)
    scans, last = 0, b""
    while block := file.read(1 << 20):
        scans += (last + block).count(b"\xff\xda")
        last = block[-1:] if block[-1:] == b"\xff" else b""
    file.seek(place)
    if scans > _MOST_SCANS:
        raise BrokenImageError(f"{who} is a JPEG of {scans} scans; {_MOST_SCANS} are read at most")


def _is_deep(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _upper_bits(image: Image.Image, who: str) -> Image.Image:
    """16 bits a pixel as 8."""
    # What Pillow has in 32 bits is of 16 in the formats that have no more.
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        kind = "floating-point numbers" if image.mode == "F" else "32-bit integers"
        raise BrokenImageError(
            f"{who} holds {kind}, of which nothing says which is white; write it with 8 or 16 bits a pixel"
        )
    values = np.asarray(image)
    highest = int(values.max())
    if 0 < highest < 4096:
        raise BrokenImageError(
            f"{who} has 16 bits a pixel and no value above {highest} of 65535, which is next to black; if it is of 12 "
            "bits or fewer, write it with 8, or its values over the whole range"
        )
    return Image.fromarray((values >> 8).astype(np.uint8))


def _with_info(image: Image.Image, of: Image.Image) -> Image.Image:
    image.info, image.format = of.info, of.format
    return image


def _upright(image: Image.Image, mode: str, who: str) -> Image.Image:
    """A copy in the mode asked for, turned, without the EXIF data that say so."""
    turn = None if image.format == "TIFF" else _TURNS.get(_orientation(image.info))  # Pillow has turned a TIFF itself
    image.info.pop("transparency", None)
    with _pillow(who):
        if between := {"LAB": "RGB", "RGBa": "RGBA", "La": "LA"}.get(image.mode):  # which convert to few others
            image = image.convert(between)
        image = image.convert(mode)
        image.info.clear()
        return image if turn is None else image.transpose(turn)


def _orientation(info: dict) -> int:
    """1 to 8 of EXIF or else XMP data, or another number where they say nothing that is understood.

    This reads the one tag. Pillow's own function writes the whole block anew, and fails by any tag in it that is odd.
    """
    exif = info.get("exif", b"")
    if not exif and isinstance(raw := info.get("Raw profile type exif"), str):  # of ImageMagick, in a PNG
        with contextlib.suppress(ValueError):
            exif = bytes.fromhex("".join(raw.split("\n")[3:]))
    found = _exif_orientation(exif) if isinstance(exif, bytes) else 0
    for key in () if found else ("XML:com.adobe.xmp", "xmp"):
        xmp = info.get(key, b"")
        xmp = xmp.encode(errors="replace") if isinstance(xmp, str) else xmp
        if isinstance(xmp, bytes) and (match := re.search(rb'tiff:Orientation(?:="|>)([0-9])', xmp)):
            return int(match[1])
    return found


def _exif_orientation(exif: bytes) -> int:
    """The tag's value in a block of EXIF data; 0 without it."""
    for _ in range(2):  # some cameras write the beginning twice
        exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (entries,) = struct.unpack_from(f"{order}H", exif, start)
        for place in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind, count = struct.unpack_from(f"{order}HHI", exif, place)
            if tag == _ORIENTATION and count == 1 and kind in (3, 4):  # of 16 or 32 bits
                return struct.unpack_from(f"{order}{'H' if kind == 3 else 'I'}", exif, place + 8)[0]
    except struct.error:  # cut short, or of no byte order
        pass
    return 0
