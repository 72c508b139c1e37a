"""The sizes and offsets of a kernel's parameters, read from its cubin's ELF sections.

The driver copies as many bytes of each argument as the cubin states, so a launcher that assumes another layout passes
garbage without an error. Section `.nv.info.<kernel>` is a list of records (format u8, attribute u8,
length u16); EIATTR_KPARAM_INFO (0x17) holds index u32, ordinal u16, offset u16 and flags u32, whose top 14 bits are the
size.
Source: the layout that cuobjdump -elf prints.
"""

import struct

SIZED, KPARAM_INFO = 4, 0x17


def sections(cubin: bytes) -> dict[str, bytes]:
    """Name -> contents of a little-endian ELF64's sections."""
    if cubin[:5] != b"\x7fELF\x02":
        raise ValueError("not an ELF64 file")
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    strings = headers[names][4]
    found = {}
    for name, _, _, _, offset, length in headers:
        end = cubin.index(b"\0", strings + name)
        found[cubin[strings + name : end].decode()] = cubin[offset : offset + length]
    return found


def parameters(cubin: bytes, kernel: str) -> list[tuple[int, int]]:
    """(offset, size) in bytes of the kernel's parameters, in order."""
    info = sections(cubin)[f".nv.info.{kernel}"]
    found, at = {}, 0
    while at < len(info):
        form, attribute, length = struct.unpack_from("<BBH", info, at)
        if attribute == KPARAM_INFO and form == SIZED:
            _, ordinal, offset, flags = struct.unpack_from("<IHHI", info, at + 4)
            found[ordinal] = (offset, flags >> 18)
        at += 4 + (length if form == SIZED else 0)
    return [found[i] for i in range(len(found))]
