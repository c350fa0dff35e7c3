"""Page images are rewritten so that a restore reads each page from its right place, in any layout."""

from __future__ import annotations

import random
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from whimbrel.agent.criu.images import (
    BadImage,
    compose_pages,
    lazy_part,
    read_messages,
    read_pagemap,
    read_vmas,
)
from whimbrel.agent.criu.protobuf import encode
from whimbrel.agent.memory.pageset import PageSet
from whimbrel.agent.memory.store import PageStore

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = 4096
PID = 1000
PRIVATE_ANONYMOUS, PRIVATE_FILE, SHARED = 0x22, 0x02, 0x21
VDSO = 1 << 3


def image(path: Path, messages: list[bytes]) -> None:
    body = b"".join(struct.pack("<I", len(message)) + message for message in messages)
    path.write_bytes(struct.pack("<II", 0x54564319, 0x57492820) + body)


def dumped(folder: Path, vmas: list[tuple[int, int, int, int]], own: dict[int, bytes]) -> None:
    """What CRIU leaves of a process whose page tables were covered: its map, and the pages in `own`."""
    entries = [
        (14, encode([(1, s), (2, e), (3, 0), (6, flags), (7, status)])) for s, e, flags, status in vmas
    ]
    image(folder / f"mm-{PID}.img", [encode([(1, 5), *entries])])
    maps = [encode([(1, at), (2, 1), (4, 4), (5, 1)]) for at in sorted(own)]
    image(folder / f"pagemap-{PID}.img", [encode([(1, 7)]), *maps])
    (folder / "pages-7.img").write_bytes(b"".join(own[at] for at in sorted(own)))


def as_criu_reads(folder: Path) -> dict[int, bytes]:
    """Pages by address, as a restore takes them: entries in order, each as long as it says."""
    number, entries = read_pagemap(folder, PID)
    data = (folder / f"pages-{number}.img").read_bytes()
    found: dict[int, bytes] = {}
    at = last = 0
    for entry in entries:
        assert entry.flags == 4
        assert entry.start >= last, "entries must ascend"
        last = entry.start + entry.pages * PAGE
        for page in range(entry.pages):
            found[entry.start + page * PAGE] = data[at : at + PAGE]
            at += PAGE
    assert at == len(data)
    return found


@pytest.fixture
def store() -> Iterator[PageStore]:
    with tempfile.TemporaryDirectory(prefix="whimbrel-test-", dir="/dev/shm") as folder:
        store = PageStore(Path(folder) / "store")
        yield store
        store.destroy()


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_every_page_is_read_from_its_place(tmp_path: Path, store: PageStore, seed: int, lazy: bool) -> None:
    # The vDSO lies below or above the rest, as without or with address randomization.
    choose = random.Random(seed)
    vmas: list[tuple[int, int, int, int]] = []
    at = 0x10000000
    for kind in choose.sample(["vdso", "anon", "anon", "file", "file", "shared", "locked"], 7):
        pages = choose.randrange(1, 700)
        flags = {"file": PRIVATE_FILE, "shared": SHARED, "locked": PRIVATE_ANONYMOUS | 0x2000}
        status = VDSO if kind == "vdso" else 0
        vmas.append((at, at + pages * PAGE, flags.get(kind, PRIVATE_ANONYMOUS), status))
        at += pages * PAGE + choose.choice([0, PAGE])
    expected, own, contents = PageSet(), {}, {}
    for start, end, flags, status in vmas:
        for address in range(start, end, PAGE):
            if choose.random() < 0.6:
                contents[address] = choose.randbytes(PAGE)
                if status == VDSO:
                    own[address] = contents[address]
                elif flags != SHARED:
                    expected.add(address, address + PAGE)
                    store.write(PID, address, contents[address])
                else:
                    del contents[address]
    dumped(tmp_path, vmas, own)
    owed = lazy_part(tmp_path, PID, expected) if lazy else PageSet()
    compose_pages(tmp_path, PID, expected, store, lazy=lazy)
    assert as_criu_reads(tmp_path) == {a: c for a, c in contents.items() if a not in owed}
    anonymous = PageSet.from_runs((s, e) for s, e, flags, status in vmas if (flags, status) == (0x22, 0))
    assert owed == (expected.intersection(anonymous) if lazy else PageSet())
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"mm-{PID}.img",
        f"pagemap-{PID}.img",
        "pages-7.img",
    ]


def test_pages_outside_every_mapping_are_refused(tmp_path: Path, store: PageStore) -> None:
    dumped(tmp_path, [(PAGE * 16, PAGE * 32, PRIVATE_ANONYMOUS, 0)], {})
    with pytest.raises(BadImage, match=r"1 resident pages lie in no mapping.*0x20000"):
        lazy_part(tmp_path, PID, PageSet.from_runs([(PAGE * 31, PAGE * 33)]))


def test_mappings_of_the_kernels_half_are_left_out(tmp_path: Path) -> None:
    dumped(tmp_path, [(PAGE, 2 * PAGE, 2, 0), (0xFFFFFFFFFF600000, 0xFFFFFFFFFF601000, 2, 4)], {})
    assert [vma.start for vma in read_vmas(tmp_path, PID)] == [PAGE]


@pytest.mark.parametrize("name", [f"mm-{PID}.img", f"pagemap-{PID}.img"])
def test_an_image_cut_anywhere_is_bad_or_says_less(tmp_path: Path, name: str) -> None:
    vmas = [(PAGE * n * 4, PAGE * (n * 4 + 2), PRIVATE_ANONYMOUS, 0) for n in range(1, 6)]
    dumped(tmp_path, vmas, {PAGE * 4: bytes(PAGE), PAGE * 8: bytes(PAGE)})
    whole = (tmp_path / name).read_bytes()
    bad = 0
    for cut in range(len(whole)):
        (tmp_path / name).write_bytes(whole[:cut])
        try:
            if name.startswith("mm"):
                read_vmas(tmp_path, PID)
            else:
                read_pagemap(tmp_path, PID)
        except BadImage as error:
            bad += 1
            assert name in str(error)  # noqa: PT017
    # A pagemap that ends between two entries is a shorter one: nothing in it says how many there are.
    assert bad >= len(whole) - 3


def test_garbage_is_a_bad_image(tmp_path: Path) -> None:
    choose = random.Random(5)
    path = tmp_path / f"mm-{PID}.img"
    for _ in range(300):
        body = choose.randbytes(choose.randrange(200))
        path.write_bytes(struct.pack("<III", 0x54564319, 1, len(body)) + body)
        try:
            assert isinstance(read_vmas(tmp_path, PID), list)
        except BadImage as error:
            assert path.name in str(error)  # noqa: PT017
    path.write_bytes(b"")
    with pytest.raises(BadImage, match="found 0 bytes"):
        list(read_messages(path))
