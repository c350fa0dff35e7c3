"""What each page must hold, as a function of the seed, so that nothing needs to be remembered to check it.

Every write of a page takes a new generation number, unique in the whole run: a page at the wrong address, of
an older round, or zeroed can therefore be told apart, and `describe` says which of them was found.
"""

from __future__ import annotations

import hashlib
import struct

PAGE_BYTES = 4096
UNTOUCHED = 0  # never written since it was mapped or discarded: zeros, or the file's own content
ZEROED = -1  # zeros were written to it
ZERO_PAGE = bytes(PAGE_BYTES)

_HEADER = struct.Struct("<8sQ")
_DATA_MAGIC = b"CHURNDAT"
_FILE_MAGIC = b"CHURNFIL"
_PATTERN_BYTES = 240  # (4096 - 16) / 17


def _page(magic: bytes, seed: int, number: int) -> bytes:
    header = _HEADER.pack(magic, number)
    stream = hashlib.shake_128(header + str(seed).encode())
    if number % 2:
        return header + stream.digest(PAGE_BYTES - len(header))
    return header + stream.digest(_PATTERN_BYTES) * 17  # compressible, as most real memory is


def data_page(seed: int, generation: int) -> bytes:
    """The 4096 bytes that write number `generation` (> 0) leaves in its page."""
    return _page(_DATA_MAGIC, seed, generation)


def file_page(seed: int, page: int) -> bytes:
    """The 4096 bytes at page `page` of the file that is mapped privately."""
    return _page(_FILE_MAGIC, seed, page)


def describe(seed: int, found: bytes) -> str:
    """Name the content of a page (4096 bytes) in one word, for the `bad` answer."""
    if found == ZERO_PAGE:
        return "zeros"
    magic, number = _HEADER.unpack_from(found)
    for known, name, content in (
        (_DATA_MAGIC, "generation", data_page),
        (_FILE_MAGIC, "file-page", file_page),
    ):
        if magic == known:
            return f"{name}-{number}" if found == content(seed, number) else f"torn-{name}-{number}"
    return f"bytes-{found[:16].hex()}"
