"""Makes a userfaultfd inside a running process and brings it out here.

A userfaultfd belongs to the address space of whoever called userfaultfd(2), and there is no call that
makes one for somebody else. So the process is stopped for a fraction of a millisecond (PTRACE_SEIZE,
PTRACE_INTERRUPT), one `syscall` instruction of its own vDSO is run with our registers, and everything is put
back: no byte of its memory changes. The descriptor is fetched by pidfd_getfd and closed in the process by a
second call.

What must be true for the process to notice nothing:

- Its signals stay where they are: all of them are blocked meanwhile (PTRACE_SETSIGMASK), so that none has to
  be taken from it and sent again, which would lose its sender and could deliver it twice.
- We stop it at the entry and the exit of the call (PTRACE_SYSCALL), not by single steps: a step ends in a
  SIGTRAP, and the kernel resets the handler of a process that ignores that.
- The call in which it slept restarts only where the kernel looks for signals. So it is put back in a stop of
  that kind (PTRACE_EVENT_STOP), the same in which it was found.
- Every wait is bounded. One thread does all of it and then ends, and the kernel detaches what an ended thread
  has traced: a process that could not be stopped in time (in uninterruptible sleep, waiting for its vfork
  child) is not stopped for nobody later.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import signal
import threading
import time
from typing import Final

from whimbrel.agent import syscalls
from whimbrel.agent.memory.maps import read_maps
from whimbrel.agent.syscalls import check

_PTRACE_GETREGS: Final = 12
_PTRACE_SETREGS: Final = 13
_PTRACE_DETACH: Final = 17
_PTRACE_SYSCALL: Final = 24
_PTRACE_SEIZE: Final = 0x4206
_PTRACE_INTERRUPT: Final = 0x4207
_PTRACE_GETSIGMASK: Final = 0x420A
_PTRACE_SETSIGMASK: Final = 0x420B
_PTRACE_O_TRACESYSGOOD: Final = 1
_PTRACE_O_SUSPEND_SECCOMP: Final = 1 << 21
_PTRACE_EVENT_STOP: Final = 128
_SYSCALL_STOP: Final = signal.SIGTRAP | 0x80
_WALL: Final = 0x40000000
_SIGNAL_MASK_BYTES: Final = 8

_NR_CLOSE: Final = 3
_NR_USERFAULTFD: Final = 323
_UFFD_USER_MODE_ONLY: Final = 1
_PF_EXITING: Final = 0x4
_NR_EPOLL_WAIT: Final = (232, 281)  # epoll_wait, epoll_pwait
_ERESTARTNOHAND: Final = 514
_SYSCALL_INSTRUCTION: Final = b"\x0f\x05"

STOP_TIMEOUT_S: Final = 1.0
_STOPS_MAX: Final = 16

_libc = ctypes.CDLL(None, use_errno=True)
_ptrace = _libc.ptrace
_ptrace.restype = ctypes.c_long
_ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


class InjectionFailed(Exception):
    """The process could not be made to open a userfaultfd; it runs on untouched."""


class _Registers(ctypes.Structure):
    # struct user_regs_struct, x86-64, from <sys/user.h>
    _fields_ = tuple(
        (name, ctypes.c_ulonglong)
        for name in (
            *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx"),
            *("rsi", "rdi", "orig_rax", "rip", "cs", "eflags", "rsp", "ss"),
            *("fs_base", "gs_base", "ds", "es", "fs", "gs"),
        )
    )


def open_userfaultfd_in(pid: int) -> int:
    """Returns a userfaultfd of `pid`'s address space; `pid` stops for well under a millisecond.

    Raises InjectionFailed; ProcessLookupError where the process is gone."""
    if platform.machine() != "x86_64":
        raise InjectionFailed(
            f"expected an x86_64 host, found {platform.machine()}: injecting a system call is only written "
            "for x86_64; migrate with --strategy stop-and-copy"
        )
    results: list[int] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(_inject(pid))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name=f"inject into {pid}", daemon=True)
    thread.start()
    thread.join()  # bounded: every wait in it is
    if errors:
        _wait_let_go(pid, thread.native_id)
        raise errors[0]
    return results[0]


def _inject(pid: int) -> int:
    try:
        pidfd = syscalls.pidfd_open(pid)
        try:
            return _in_stop(pid, pidfd, _find_syscall_instruction(pid), seccomp=_has_seccomp(pid))
        finally:
            os.close(pidfd)
    except ProcessLookupError:
        raise
    except (OSError, InjectionFailed) as error:
        if _is_ending(pid):  # it refuses to be traced or read before it is gone
            raise ProcessLookupError(f"pid {pid} is ending") from error
        if isinstance(error, InjectionFailed):
            raise
        raise InjectionFailed(f"pid {pid}: {error}") from error


def _is_ending(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            state, *fields = stat.read().rpartition(")")[2].split()
        with open(f"/proc/{pid}/status") as status:
            lines = dict(line.split(":", 1) for line in status)
    except (FileNotFoundError, ProcessLookupError):
        return True
    killed = int(lines["SigPnd"], 16) | int(lines["ShdPnd"], 16)
    return state in "ZX" or bool(int(fields[5]) & _PF_EXITING) or bool(killed & 1 << signal.SIGKILL - 1)


def _wait_let_go(pid: int, tracer: int | None) -> None:
    """An ended thread is ended for Python a moment before the kernel lets go of what it traced."""
    deadline = time.monotonic() + STOP_TIMEOUT_S
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while time.monotonic() < deadline:
            with open(f"/proc/{pid}/status") as status:
                if f"TracerPid:\t{tracer}\n" not in status:
                    return
            time.sleep(0.001)


def _in_stop(pid: int, pidfd: int, instruction: int, *, seccomp: bool) -> int:
    options = _PTRACE_O_TRACESYSGOOD | (_PTRACE_O_SUSPEND_SECCOMP if seccomp else 0)
    check(_ptrace(_PTRACE_SEIZE, pid, None, options), f"PTRACE_SEIZE {pid}")
    check(_ptrace(_PTRACE_INTERRUPT, pid, None, None), f"PTRACE_INTERRUPT {pid}")
    _wait_for(pid, _PTRACE_EVENT_STOP)
    try:
        saved, mask = _Registers(), ctypes.c_uint64()
        check(_ptrace(_PTRACE_GETREGS, pid, None, ctypes.addressof(saved)), "PTRACE_GETREGS")
        _restart_epoll(saved)
        check(
            _ptrace(_PTRACE_GETSIGMASK, pid, _SIGNAL_MASK_BYTES, ctypes.addressof(mask)), "PTRACE_GETSIGMASK"
        )
        try:
            _set_signal_mask(pid, 0xFFFF_FFFF_FFFF_FFFF)
            flags = os.O_CLOEXEC | os.O_NONBLOCK | _UFFD_USER_MODE_ONLY
            inner = _run(pid, saved, instruction, _NR_USERFAULTFD, flags)
            if inner < 0:
                raise InjectionFailed(f"userfaultfd in pid {pid}: {os.strerror(-inner)}")
            try:
                return syscalls.pidfd_getfd(pidfd, inner)
            finally:
                _run(pid, saved, instruction, _NR_CLOSE, inner)
        finally:
            _set_signal_mask(pid, mask.value)
            check(_ptrace(_PTRACE_SETREGS, pid, None, ctypes.addressof(saved)), "PTRACE_SETREGS")
    finally:
        with contextlib.suppress(OSError):
            check(_ptrace(_PTRACE_DETACH, pid, None, None), "PTRACE_DETACH")


def _restart_epoll(saved: _Registers) -> None:
    """epoll_wait is the one common call that no stop restarts: it returns EINTR, and a few programs do not
    expect that. Without a time limit it may as well start again; with one, EINTR is what tells the program
    to look at its clock."""
    interrupted = ctypes.c_longlong(saved.rax).value == -errno.EINTR
    if interrupted and saved.orig_rax in _NR_EPOLL_WAIT and ctypes.c_int(saved.r10).value < 0:
        saved.rax = ctypes.c_ulonglong(-_ERESTARTNOHAND).value


def _set_signal_mask(pid: int, mask: int) -> None:
    value = ctypes.c_uint64(mask)
    check(_ptrace(_PTRACE_SETSIGMASK, pid, _SIGNAL_MASK_BYTES, ctypes.addressof(value)), "PTRACE_SETSIGMASK")


def _wait_stop(pid: int) -> tuple[int, int]:
    """(signal, ptrace event) of the next stop. Raises InjectionFailed where it does not come in time."""
    deadline = time.monotonic() + STOP_TIMEOUT_S
    spins = 0
    while True:
        try:
            waited, status = os.waitpid(pid, _WALL | os.WNOHANG)
        except ChildProcessError as error:
            raise ProcessLookupError(f"pid {pid} ended while it was being stopped") from error
        if waited == pid:
            break
        if time.monotonic() > deadline:
            raise InjectionFailed(
                f"expected pid {pid} to stop within {STOP_TIMEOUT_S:g} s, found it in uninterruptible "
                f"sleep or waiting for a vfork child (see /proc/{pid}/stack); migrate again when it is over"
            )
        # A stop takes some microseconds where a processor is free.
        spins += 1
        if spins > 50:
            time.sleep(0.0002)
        else:
            os.sched_yield()
    if not os.WIFSTOPPED(status):
        raise ProcessLookupError(f"pid {pid} ended while it was being stopped")
    return os.WSTOPSIG(status), status >> 16


def _wait_for(pid: int, event: int) -> None:
    """Up to the stop wanted. A signal that arrives before it is delivered by going on with it."""
    for _ in range(_STOPS_MAX):
        stop, found = _wait_stop(pid)
        if found == event:
            return
        check(
            _ptrace(_PTRACE_SYSCALL, pid, None, stop if found == 0 and stop != _SYSCALL_STOP else 0), "PTRACE"
        )
    raise InjectionFailed(f"pid {pid} did not reach the stop that was asked for in {_STOPS_MAX} stops")


def _run(pid: int, saved: _Registers, instruction: int, number: int, argument: int) -> int:
    """Runs one system call with one argument; returns its result (negative errno on failure)."""
    registers = _Registers.from_buffer_copy(saved)
    # orig_rax = -1: the kernel must not take our register change for a system call to restart.
    registers.orig_rax = 0xFFFFFFFFFFFFFFFF
    registers.rax = number
    registers.rdi = argument
    registers.rip = instruction
    check(_ptrace(_PTRACE_SETREGS, pid, None, ctypes.addressof(registers)), "PTRACE_SETREGS")
    for _ in ("entry", "exit"):
        check(_ptrace(_PTRACE_SYSCALL, pid, None, None), "PTRACE_SYSCALL")
        _wait_syscall(pid)
    check(_ptrace(_PTRACE_GETREGS, pid, None, ctypes.addressof(registers)), "PTRACE_GETREGS")
    result = ctypes.c_longlong(registers.rax).value
    # To where the kernel looks for signals, without another instruction of the process.
    check(_ptrace(_PTRACE_INTERRUPT, pid, None, None), "PTRACE_INTERRUPT")
    check(_ptrace(_PTRACE_SYSCALL, pid, None, None), "PTRACE_SYSCALL")
    _wait_for(pid, _PTRACE_EVENT_STOP)
    return result


def _wait_syscall(pid: int) -> None:
    for _ in range(_STOPS_MAX):
        stop, event = _wait_stop(pid)
        if stop == _SYSCALL_STOP and event == 0:
            return
        # A SIGSTOP cannot be blocked: passed on; it stops the process for good once we have detached.
        check(_ptrace(_PTRACE_SYSCALL, pid, None, stop if event == 0 else 0), "PTRACE_SYSCALL")
    raise InjectionFailed(f"pid {pid} did not reach a system call of ours in {_STOPS_MAX} stops")


def _has_seccomp(pid: int) -> bool:
    with open(f"/proc/{pid}/status") as status:
        return any(line.startswith("Seccomp:") and line.split()[1] != "0" for line in status)


def _find_syscall_instruction(pid: int) -> int:
    mappings = read_maps(pid)
    if not mappings:
        raise ProcessLookupError(f"pid {pid} has no memory any more: it is ending")
    for mapping in mappings:
        if mapping.name == "[vdso]":
            buffer = memoryview(bytearray(mapping.end - mapping.start))
            size = syscalls.process_vm_readv(pid, [(mapping.start, mapping.end)], buffer)
            at = bytes(buffer[:size]).find(_SYSCALL_INSTRUCTION)
            if at >= 0:
                return mapping.start + at
    raise InjectionFailed(f"pid {pid} maps no vDSO with a syscall instruction")
