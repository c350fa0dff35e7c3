"""How long the workload will be silent if it is frozen now; learned online, for one workload and host pair.

Every decision of pre-copy compares this prediction with the budget, so it must be honest before anything
was measured (the priors come from measurements on another machine) and follow what this pair really does.
Each term is a prior, computed from sizes, times a scale which each finished migration moves a little.
"""

from __future__ import annotations

from typing import Final

import msgspec

from whimbrel.events.records import PhaseTimes, Strategy

PAGE_BYTES: Final = 4096
MIB: Final = 1 << 20
GIB: Final = 1 << 30

LINK_BYTES_PER_S_PRIOR: Final = 110e6
"""Until a stream has been measured: 1 Gbit/s less its headers."""
LEARNING_RATE: Final = 0.4
SCALE_MIN: Final = 0.05
SCALE_MAX: Final = 20.0

_FREEZE_MS: Final = 3.0
_FREEZE_MS_PER_PROCESS: Final = 0.5
_DUMP_MS: Final = 14.0
_DUMP_MS_PER_PROCESS: Final = 3.0
_SCAN_MS_PER_GIB: Final = 4.0
_STREAM_MS: Final = 4.0
_RESTORE_MS: Final = 18.0
_RESTORE_MS_PER_PROCESS: Final = 4.0
_EAGER_RESTORE_MS_PER_GIB: Final = 700.0
_COMMIT_MS: Final = 6.0
_FLIP_MS: Final = 2.0
_OTHER_MS: Final = 15.0


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What would have to cross in the freeze, and how fast it could."""

    memory_bytes: int
    processes: int
    remaining_bytes: int
    """Memory that the target's store does not hold yet."""
    link_bytes_per_s: float
    """Memory bytes per second that the stream achieves; ≤ 0 while unknown."""
    strategy: Strategy
    flips_traffic: bool = True

    def rate(self) -> float:
        return self.link_bytes_per_s if self.link_bytes_per_s > 0 else LINK_BYTES_PER_S_PRIOR


class DowntimeModel(msgspec.Struct, frozen=True, kw_only=True):
    """Scales of the priors; a fresh model is all ones. Kept in KV between migrations."""

    freeze: float = 1.0
    dump: float = 1.0
    stream: float = 1.0
    restore: float = 1.0
    commit: float = 1.0
    flip: float = 1.0
    other_ms: float = _OTHER_MS
    image_bytes_per_process: float = 256.0 * 1024
    samples: int = 0

    def predict(self, load: Load) -> PhaseTimes:
        """Milliseconds per term if the workload were frozen now; grows with all of `load` but the rate."""
        prior = _prior(load, self.image_bytes_per_process)
        return PhaseTimes(
            freeze=prior.freeze * self.freeze,
            dump=prior.dump * self.dump,
            stream=prior.stream * self.stream,
            restore=prior.restore * self.restore,
            commit=prior.commit * self.commit,
            flip=prior.flip * self.flip,
            other=self.other_ms,
        )

    def learn(self, load: Load, measured: PhaseTimes, image_bytes: int) -> DowntimeModel:
        """The model after one migration took `measured` milliseconds under `load`."""
        image_per_process = _toward(self.image_bytes_per_process, image_bytes / max(1, load.processes))
        prior = _prior(load, image_bytes / max(1, load.processes))
        return DowntimeModel(
            freeze=_rescaled(self.freeze, measured.freeze, prior.freeze),
            dump=_rescaled(self.dump, measured.dump, prior.dump),
            stream=_rescaled(self.stream, measured.stream, prior.stream),
            restore=_rescaled(self.restore, measured.restore, prior.restore),
            commit=_rescaled(self.commit, measured.commit, prior.commit),
            flip=_rescaled(self.flip, measured.flip, prior.flip) if load.flips_traffic else self.flip,
            other_ms=_toward(self.other_ms, max(0.0, measured.other)),
            image_bytes_per_process=image_per_process,
            samples=self.samples + 1,
        )


def _prior(load: Load, image_bytes_per_process: float) -> PhaseTimes:
    processes = max(1, load.processes)
    memory_gib = load.memory_bytes / GIB
    # CRIU dumps no memory, so its time does not grow with it; the page scan and the last pages go on beside
    # it, and only what outlasts it counts as streaming.
    dump_ms = _DUMP_MS + _DUMP_MS_PER_PROCESS * (processes - 1)
    pages_ms = _SCAN_MS_PER_GIB * memory_gib + stream_bytes_ms(load.remaining_bytes, load.rate())
    images_ms = stream_bytes_ms(image_bytes_per_process * processes, load.rate())
    stream_ms = _STREAM_MS + images_ms + max(0.0, pages_ms - dump_ms)
    restore_ms = _RESTORE_MS + _RESTORE_MS_PER_PROCESS * (processes - 1)
    if load.strategy in (Strategy.PRE_COPY, Strategy.STOP_AND_COPY):
        restore_ms += _EAGER_RESTORE_MS_PER_GIB * memory_gib
    return PhaseTimes(
        freeze=_FREEZE_MS + _FREEZE_MS_PER_PROCESS * processes,
        dump=dump_ms,
        stream=stream_ms,
        restore=restore_ms,
        commit=_COMMIT_MS,
        flip=_FLIP_MS if load.flips_traffic else 0.0,
    )


def stream_bytes_ms(count: float, bytes_per_s: float) -> float:
    return count / bytes_per_s * 1000.0


def _toward(old: float, new: float) -> float:
    return old + LEARNING_RATE * (new - old)


def _rescaled(scale: float, measured_ms: float, prior_ms: float) -> float:
    """One outlier (a paused machine, a clock step) must not spoil the next predictions: hence the clamp."""
    if prior_ms <= 0.0:
        return scale
    return _toward(scale, min(SCALE_MAX, max(SCALE_MIN, measured_ms / prior_ms)))
