"""What a thread and a block of each kernel occupy, read from a CUDA binary (ELF) without NVIDIA's tools."""

import struct
from typing import NamedTuple

# Attributes in the section .nv.info, each of a symbol of the symbol table.
_FRAME_SIZE, _MIN_STACK_SIZE, _REGCOUNT = 0x11, 0x12, 0x2F
_RESERVED = 1024  # bytes of shared memory that binaries from sm_90 on count in, besides what the kernel declares
_HAS_SIZE = 4  # format of an attribute: followed by as many bytes as its value says


class Resources(NamedTuple):
    """What a kernel occupies."""

    registers: int  # of a thread
    static_shared: int  # bytes that a block declares
    local: int  # bytes of a thread's stack: arrays that are indexed at run time, and registers that did not suffice


def resources(cubin: bytes) -> dict[str, Resources]:
    """The kernels of a binary by name."""
    assert cubin[:6] == b"\x7fELF\x02\x01", "not a little-endian 64-bit ELF file"
    (start,) = struct.unpack_from("<Q", cubin, 0x28)
    count, names_index = struct.unpack_from("<HH", cubin, 0x3C)
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, start + 64 * i) for i in range(count)]

    def text(table: int, offset: int) -> str:
        begin = headers[table][4] + offset
        return cubin[begin : cubin.index(b"\0", begin)].decode()

    sections = {text(names_index, header[0]): header for header in headers}
    _, _, _, _, offset, size, strings, *_ = sections[".symtab"]
    symbols = [text(strings, struct.unpack_from("<I", cubin, offset + i)[0]) for i in range(0, size, 24)]
    values: dict[tuple[int, str], int] = {}
    _, _, _, _, offset, size, *_ = sections[".nv.info"]
    end = offset + size
    while offset < end:
        form, attribute, value = struct.unpack_from("<BBH", cubin, offset)
        offset += 4
        if form == _HAS_SIZE:
            if attribute in (_FRAME_SIZE, _MIN_STACK_SIZE, _REGCOUNT):
                symbol, number = struct.unpack_from("<II", cubin, offset)
                values[attribute, symbols[symbol]] = number
            offset += value
    kernels, reserved = {}, _RESERVED if ".nv.shared.reserved.0" in sections else 0
    for name in sections:
        if name.startswith(".text."):
            kernel = name.removeprefix(".text.")
            shared = sections.get(f".nv.shared.{kernel}")
            local = max(values[_FRAME_SIZE, kernel], values[_MIN_STACK_SIZE, kernel])
            kernels[kernel] = Resources(values[_REGCOUNT, kernel], shared[5] - reserved if shared else 0, local)
    return kernels
