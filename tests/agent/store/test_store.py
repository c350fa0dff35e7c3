"""The page store keeps every page where it belongs, says what it has, and never invents any."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from whimbrel.agent.memory.pageset import PageSet
from whimbrel.agent.memory.store import (
    DIGEST_BYTES,
    MissingPages,
    PageStore,
    StoreError,
    StoreFull,
    digest_runs,
    hash_pages,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = 4096
HEAP = 0x5555_0000_0000
TOP = 0x7FFF_FFFF_F000


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="whimbrel-store-test-", dir="/dev/shm") as name:
        yield Path(name) / "store"


def used_bytes(store: PageStore, space: int) -> int:
    return os.fstat(store.fd(space)).st_blocks * 512


@pytest.mark.parametrize("seed", range(5))
def test_like_a_dict_of_pages(seed: int, folder: Path) -> None:
    """Random writes, zeroes, drops and reopenings against the obvious model."""
    chance = random.Random(seed)
    store = PageStore(folder)
    model: dict[int, bytes] = {}
    for step in range(400):
        first = chance.randrange(1100)
        count = chance.choice([1, 2, 7, 300])
        addresses = [HEAP + page * PAGE for page in range(first, first + count)]
        match chance.choice(
            ["write", "write", "zero", "drop", "reopen"] if step % 20 == 0 else ["write", "zero", "drop"]
        ):
            case "write":
                data = chance.randbytes(count * PAGE)
                store.write(3, addresses[0], data)
                model.update({a: data[i * PAGE : (i + 1) * PAGE] for i, a in enumerate(addresses)})
            case "zero":
                store.write_zero(3, addresses[0], count * PAGE)
                model.update(dict.fromkeys(addresses, bytes(PAGE)))
            case "drop":
                store.drop(3, PageSet.from_runs([(addresses[0], addresses[-1] + PAGE)]))
                for address in addresses:
                    model.pop(address, None)
            case "reopen":
                store.sync()
                store.close()
                store = PageStore(folder)
    data_pages = sum(1 for data in model.values() if data != bytes(PAGE))
    assert store.received(3) == PageSet.from_runs((a, a + PAGE) for a in model)
    assert len(store.data_pages(3)) == data_pages
    assert used_bytes(store, 3) == data_pages * PAGE
    page = bytearray(PAGE)
    for address, data in model.items():
        store.read_into(3, address, page)
        assert page == data
    store.destroy()
    assert not folder.exists()


def test_what_never_came_is_not_handed_out_as_zero(folder: Path) -> None:
    store = PageStore(folder)
    store.write(1, HEAP, b"x" * PAGE)
    store.write_zero(1, HEAP + PAGE, PAGE)
    store.read_into(1, HEAP, bytearray(2 * PAGE))
    for space, address, count in ((1, HEAP + 2 * PAGE, 1), (1, HEAP, 3), (2, HEAP, 1)):
        with pytest.raises(MissingPages):
            store.read_into(space, address, bytearray(count * PAGE))
    expected = PageSet.from_runs([(HEAP, HEAP + 4 * PAGE)])
    assert list(store.missing(1, expected).runs()) == [(HEAP + 2 * PAGE, HEAP + 4 * PAGE)]
    assert store.missing(2, expected) == expected
    store.destroy()


def test_both_ends_of_the_address_space(folder: Path) -> None:
    store = PageStore(folder)
    page = bytearray(PAGE)
    for address in (0, 0x1000, TOP - PAGE, TOP, (1 << 56) - PAGE):
        store.write(1, address, address.to_bytes(8, "little") * 512)
        store.read_into(1, address, page)
        assert page == address.to_bytes(8, "little") * 512
    assert len(store.received(1)) == 5
    for address, size in ((1 << 56, PAGE), (1, PAGE), (0, 100)):
        with pytest.raises(ValueError, match="not a page range"):
            store.write(1, address, b"x" * size)
    store.destroy()


def test_another_process_opens_what_was_synced(folder: Path) -> None:
    store = PageStore(folder)
    store.write(9, HEAP, b"y" * PAGE)
    store.write_zero(9, HEAP + PAGE, 2 * PAGE)
    store.sync()
    script = (
        "import sys, pathlib; from whimbrel.agent.memory.store import PageStore\n"
        "s = PageStore(pathlib.Path(sys.argv[1])); b = bytearray(3 * 4096)\n"
        f"s.read_into(9, {HEAP}, b); print(len(s.received(9)), len(s.data_pages(9)), "
        "b.count(b'y'), s.spaces())"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert result.stdout.split(maxsplit=3) == ["3", "1", "4096", "(9,)\n"]
    store.destroy()


def test_after_a_crash_only_what_is_certain_counts(folder: Path) -> None:
    """kill -9 between syncs: data pages are found in the file, zero pages count as missing again."""
    script = (
        "import os, sys, pathlib; from whimbrel.agent.memory.store import PageStore\n"
        "s = PageStore(pathlib.Path(sys.argv[1]))\n"
        f"s.write(1, {HEAP}, b'a' * 8192); s.write_zero(1, {HEAP + 4 * PAGE}, 4096); s.sync()\n"
        f"s.write_zero(1, {HEAP}, 4096); s.write(1, {HEAP + 2 * PAGE}, b'b' * 4096)\n"
        "os.kill(os.getpid(), 9)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert result.returncode == -signal.SIGKILL
    store = PageStore(folder)
    assert list(store.received(1).runs()) == [(HEAP + PAGE, HEAP + 3 * PAGE)]
    assert store.data_pages(1) == store.received(1)
    store.destroy()


def test_a_foreign_folder_is_refused(folder: Path) -> None:
    folder.mkdir()
    (folder / "notes.pages").write_text("these are mine")
    with pytest.raises(StoreError, match="cannot be opened as a page store"):
        PageStore(folder)
    assert (folder / "notes.pages").read_text() == "these are mine"


def test_a_damaged_index_is_refused(folder: Path) -> None:
    store = PageStore(folder)
    store.write(1, HEAP, b"x" * PAGE)
    store.sync()
    store.close()
    (folder / "1.index").write_bytes(b"\x05damaged")
    with pytest.raises(StoreError, match="cannot be opened as a page store"):
        PageStore(folder)


def test_full_names_what_is_free_and_what_is_needed(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "whimbrel-test", str(tmp_path)], check=True)
    try:
        store = PageStore(tmp_path / "store")
        free = store.free_bytes()
        assert 900_000 < free <= 1 << 20
        store.write(1, HEAP, b"x" * 64 * PAGE)
        assert store.free_bytes() <= free - 64 * PAGE
        with pytest.raises(StoreFull) as caught:
            store.write(1, HEAP + 32 * PAGE, b"y" * 512 * PAGE)
        assert caught.value.needed_bytes > 0
        assert str(caught.value.needed_bytes) in str(caught.value)
        assert str(caught.value.free_bytes) in str(caught.value)
        # The range that failed is missing as a whole, its memory free again, the rest untouched.
        assert list(store.received(1).runs()) == [(HEAP, HEAP + 32 * PAGE)]
        assert used_bytes(store, 1) == 32 * PAGE
        store.write(1, HEAP + 32 * PAGE, b"z" * PAGE)
        store.destroy()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_destroy_leaves_nothing_twice(folder: Path) -> None:
    store = PageStore(folder)
    store.write(1, HEAP, b"x" * PAGE)
    store.sync()
    store.destroy()
    store.destroy()
    assert not folder.exists()


def test_digests_name_every_page() -> None:
    data = random.Random(1).randbytes(5 * PAGE)
    expected = [blake2b(data[n * PAGE : (n + 1) * PAGE], digest_size=DIGEST_BYTES).digest() for n in range(5)]
    assert hash_pages(data) == expected
    changed = bytearray(data)
    changed[2 * PAGE + 77] ^= 1
    assert [a == b for a, b in zip(hash_pages(changed), expected, strict=True)] == [
        True,
        True,
        False,
        True,
        True,
    ]


def test_digests_of_runs_are_streamed_alike_on_both_sides(folder: Path) -> None:
    store = PageStore(folder)
    data = random.Random(2).randbytes(10 * PAGE)
    store.write(1, HEAP, data)
    store.write_zero(1, HEAP + 20 * PAGE, PAGE)
    pieces = list(digest_runs(store.received(1).runs(), partial(store.read_into, 1), buffer_bytes=4 * PAGE))
    assert [(address, len(digests) // DIGEST_BYTES) for address, digests in pieces] == [
        (HEAP, 4),
        (HEAP + 4 * PAGE, 4),
        (HEAP + 8 * PAGE, 2),
        (HEAP + 20 * PAGE, 1),
    ]
    assert b"".join(digests for _, digests in pieces) == b"".join(hash_pages(data + bytes(PAGE)))
    store.destroy()
