"""The recording: well-formed, at one size, every frame once and in order, the last without animation."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree import ElementTree

from whimbrel.controller.demo.recording import FRAMES_MAX, Recording

if TYPE_CHECKING:
    from pathlib import Path

SVG = "{http://www.w3.org/2000/svg}"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def frames_of(path: Path) -> list[ElementTree.Element]:
    root = ElementTree.parse(path).getroot()
    assert root.tag == f"{SVG}svg"
    return root.findall(f"{SVG}g")


def text_of(frame: ElementTree.Element) -> str:
    return "".join(frame.itertext()).replace("\xa0", " ")


def recorded(path: Path, shown: int) -> list[ElementTree.Element]:
    clock = Clock()
    recording = Recording("title", 60, clock)
    recording.keep("first line")
    for number in range(shown):
        clock.now += 1.0
        recording.show(f"state {number}\nwith more lines")
    clock.now += 1.0
    recording.keep("the end")
    recording.save(path / "folder" / "demo.svg")
    return frames_of(path / "folder" / "demo.svg")


def test_what_is_kept_stays_and_what_is_shown_goes(tmp_path: Path) -> None:
    frames = recorded(tmp_path, 3)
    assert len(frames) == 5
    assert all("first line" in text_of(frame) for frame in frames)
    assert [f"state {n}" in text_of(frame) for n, frame in enumerate(frames[1:4])] == [True] * 3
    assert "state" not in text_of(frames[-1])
    assert "the end" in text_of(frames[-1])
    assert len({frame.find(f"{SVG}svg").get("viewBox") for frame in frames}) == 1  # type: ignore[union-attr]


def test_only_the_last_frame_is_seen_without_animation_and_none_twice_with_it(tmp_path: Path) -> None:
    frames = recorded(tmp_path, 4)
    assert [frame.get("visibility") for frame in frames] == ["hidden"] * 5 + ["visible"]
    spans = []
    for frame in frames:
        animation = frame.find(f"{SVG}animate")
        assert animation is not None
        times = [float(time) for time in animation.get("keyTimes", "").split(";")]
        values = animation.get("values", "").split(";")
        assert len(times) == len(values)
        assert times[0] == 0.0
        begin = times[values.index("visible")]
        end = times[-1] if values[-1] == "hidden" else 1.0
        assert begin < end
        spans.append((begin, end))
    assert spans[0][0] == 0.0
    assert spans[-1][1] == 1.0
    assert [end for _, end in spans[:-1]] == [begin for begin, _ in spans[1:]]


def test_a_long_session_keeps_its_first_and_last_frame(tmp_path: Path) -> None:
    frames = recorded(tmp_path, 3 * FRAMES_MAX)
    assert len(frames) == FRAMES_MAX
    assert "state" not in text_of(frames[0])
    assert "the end" in text_of(frames[-1])


def test_frames_faster_than_the_eye_are_left_out(tmp_path: Path) -> None:
    recording = Recording("title", 60, Clock())
    for number in range(100):
        recording.show(f"state {number}")
    recording.save(tmp_path / "demo.svg")
    assert len(frames_of(tmp_path / "demo.svg")) == 1
