"""The calls Python 3.11 has no name for: timerfd, signalfd, queued signals, semaphores in shared memory."""

from __future__ import annotations

import ctypes
import os
import struct

CLOCK_MONOTONIC = 1
SEMAPHORE_BYTES = 64
SIGNALFD_INFO_BYTES = 128
_SSI_INT = struct.Struct("<44xi")  # offset of ssi_int in struct signalfd_siginfo

_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


class _Sigval(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("pointer", ctypes.c_void_p))


_libc.sigqueue.argtypes = (ctypes.c_int, ctypes.c_int, _Sigval)
for _name in ("sem_init", "sem_wait", "sem_post"):
    getattr(_libc, _name).argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint)[
        : 3 if _name == "sem_init" else 1
    ]


def _must(result: int, call: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result


def timerfd() -> int:
    """A non-blocking timerfd, not armed yet."""
    return _must(_libc.timerfd_create(CLOCK_MONOTONIC, os.O_CLOEXEC | os.O_NONBLOCK), "timerfd_create")


def arm_timerfd(descriptor: int, after_s: float, *, again: bool) -> None:
    """Expire once after `after_s`, or, with `again`, every `after_s` (it must be below one second)."""
    once = _Timespec(0, int(after_s * 1e9))
    setting = _Itimerspec(once if again else _Timespec(0, 0), once)
    _must(_libc.timerfd_settime(descriptor, 0, ctypes.byref(setting), None), "timerfd_settime")


def signalfd(number: int) -> int:
    """A non-blocking signalfd for one signal, which the caller has blocked in all threads."""
    mask = (ctypes.c_ulong * 16)()  # sigset_t
    mask[0] = 1 << (number - 1)
    return _must(_libc.signalfd(-1, ctypes.byref(mask), os.O_CLOEXEC | os.O_NONBLOCK), "signalfd")


def read_signals(descriptor: int) -> list[int]:
    """The values queued with the signals that wait in a signalfd, oldest first."""
    try:
        waiting = os.read(descriptor, 64 * SIGNALFD_INFO_BYTES)
    except BlockingIOError:
        return []
    return [_SSI_INT.unpack_from(waiting, at)[0] for at in range(0, len(waiting), SIGNALFD_INFO_BYTES)]


def queue_signal(pid: int, number: int, value: int) -> None:
    """sigqueue; BlockingIOError when the receiver's queue is full."""
    _must(_libc.sigqueue(pid, number, _Sigval(number=value)), "sigqueue")


class SharedSemaphore:
    """A glibc semaphore in memory that several processes share: its wait is a futex across processes."""

    def __init__(self, address: int, create: bool) -> None:
        self._address = address
        if create:
            _must(_libc.sem_init(address, 1, 1), "sem_init")

    def __enter__(self) -> None:
        while _libc.sem_wait(self._address):  # EINTR
            pass

    def __exit__(self, *_failure: object) -> None:
        _must(_libc.sem_post(self._address), "sem_post")
