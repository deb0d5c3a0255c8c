"""What reading a file that is no whole image may raise, whichever format it has or claims to have: seen by changing
bytes of images in fifteen formats that Pillow reads."""

import struct
import zlib

from PIL import Image

__all__ = ["UNREADABLE"]

UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    RuntimeError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    ModuleNotFoundError,  # where Ultralytics, once imported, answers Pillow's refusal by asking for another package
)
