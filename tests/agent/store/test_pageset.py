"""PageSet must be indistinguishable from a plain set of page numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whimbrel.agent.memory.pageset import PAGE_BYTES, PageSet

# Near chunk borders (512 pages), where the masks are cut, and far apart, where the dict is sparse.
_pages = st.one_of(st.integers(0, 1600), st.integers(508, 516), st.integers((1 << 35) - 3, (1 << 35) + 700))
_lengths = st.one_of(st.integers(0, 4), st.integers(500, 520), st.integers(0, 1600))
_ranges = st.tuples(_pages, _lengths)
_steps = st.lists(st.tuples(st.sampled_from(["add", "discard"]), _ranges), max_size=12)


def _play(steps: list[tuple[str, tuple[int, int]]]) -> tuple[PageSet, set[int]]:
    pages, model = PageSet(), set[int]()
    for verb, (first, count) in steps:
        numbers = range(first, first + count)
        if verb == "add":
            pages.add(first * PAGE_BYTES, (first + count) * PAGE_BYTES)
            model.update(numbers)
        else:
            pages.discard(first * PAGE_BYTES, (first + count) * PAGE_BYTES)
            model.difference_update(numbers)
    return pages, model


def _numbers(pages: PageSet) -> set[int]:
    found = set[int]()
    last_end = -1
    for start, end in pages.runs():
        assert last_end < start < end, "runs ascend, are not empty and are joined"
        last_end = end
        found.update(range(start // PAGE_BYTES, end // PAGE_BYTES))
    return found


@given(_steps)
def test_add_and_discard_like_a_set(steps: list[tuple[str, tuple[int, int]]]) -> None:
    pages, model = _play(steps)
    assert _numbers(pages) == model
    assert len(pages) == len(model)
    assert bool(pages) == bool(model)
    assert PageSet.unpack(pages.pack()) == pages
    assert PageSet.from_runs(pages.runs()) == pages


@given(_steps, _steps)
def test_algebra_like_a_set(
    left: list[tuple[str, tuple[int, int]]], right: list[tuple[str, tuple[int, int]]]
) -> None:
    (a, model_a), (b, model_b) = _play(left), _play(right)
    assert _numbers(a.difference(b)) == model_a - model_b
    assert _numbers(a.intersection(b)) == model_a & model_b
    joined, shrunk = a.copy(), a.copy()
    joined.update(b)
    shrunk.difference_update(b)
    assert _numbers(joined) == model_a | model_b
    assert shrunk == a.difference(b)
    assert _numbers(a) == model_a, "the copies shared nothing with their original"


@given(_steps, _ranges, _pages)
def test_questions_like_a_set(
    steps: list[tuple[str, tuple[int, int]]], asked: tuple[int, int], page: int
) -> None:
    pages, model = _play(steps)
    first, count = asked
    numbers = set(range(first, first + count))
    start, end = first * PAGE_BYTES, (first + count) * PAGE_BYTES
    assert pages.covers(start, end) == (numbers <= model)
    assert pages.overlaps(start, end) == bool(numbers & model)
    assert (page * PAGE_BYTES + 17 in pages) == (page in model)


def test_a_whole_address_space_is_cheap_to_name() -> None:
    pages = PageSet.from_runs([(1 << 46, (1 << 46) + (4 << 30))])
    assert len(pages) == 1 << 20
    assert len(pages.pack()) < 64
    assert list(pages.runs()) == [(1 << 46, (1 << 46) + (4 << 30))]
    pages.discard(0, 1 << 56)
    assert not pages


@pytest.mark.parametrize(
    ("start", "end"), [(1, 4096), (0, 4097), (8192, 4096), (-4096, 0), (0, (1 << 56) + 4096)]
)
def test_ranges_that_are_none_are_refused(start: int, end: int) -> None:
    with pytest.raises(ValueError, match="not a page range"):
        PageSet().add(start, end)


@given(st.binary(max_size=200))
def test_damaged_packs_are_refused_not_believed(noise: bytes) -> None:
    for packed in (noise, b"PS1" + noise, PageSet.from_runs([(0, 4096)]).pack() + noise[:1] + b"x"):
        with pytest.raises(ValueError, match="packed page set"):
            PageSet.unpack(packed)
