"""Makes a userfaultfd inside a running process and brings it out here.

A userfaultfd belongs to the address space of whoever called userfaultfd(2), and there is no call that
makes one for somebody else. So the process is stopped for a fraction of a millisecond (PTRACE_SEIZE,
PTRACE_INTERRUPT), one `syscall` instruction of its own vDSO is single-stepped with our registers, and
everything is put back: no byte of its memory changes. The descriptor is fetched by pidfd_getfd and closed
in the process by a second step.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal
from typing import Final

from whimbrel.agent import syscalls
from whimbrel.agent.syscalls import check

_PTRACE_GETREGS: Final = 12
_PTRACE_SETREGS: Final = 13
_PTRACE_SINGLESTEP: Final = 9
_PTRACE_DETACH: Final = 17
_PTRACE_SEIZE: Final = 0x4206
_PTRACE_INTERRUPT: Final = 0x4207
_PTRACE_O_SUSPEND_SECCOMP: Final = 1 << 21
_WALL: Final = 0x40000000

_NR_CLOSE: Final = 3
_NR_USERFAULTFD: Final = 323
_UFFD_USER_MODE_ONLY: Final = 1
_SYSCALL_INSTRUCTION: Final = b"\x0f\x05"

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
    instruction = _find_syscall_instruction(pid)
    pidfd = syscalls.pidfd_open(pid)
    try:
        _seize(pid)
        try:
            saved = _Registers()
            check(_ptrace(_PTRACE_GETREGS, pid, None, ctypes.addressof(saved)), "PTRACE_GETREGS")
            try:
                flags = os.O_CLOEXEC | os.O_NONBLOCK | _UFFD_USER_MODE_ONLY
                inner = _run(pid, saved, instruction, _NR_USERFAULTFD, flags)
                if inner < 0:
                    raise InjectionFailed(f"userfaultfd in pid {pid}: {os.strerror(-inner)}")
                try:
                    return syscalls.pidfd_getfd(pidfd, inner)
                finally:
                    _run(pid, saved, instruction, _NR_CLOSE, inner)
            finally:
                check(_ptrace(_PTRACE_SETREGS, pid, None, ctypes.addressof(saved)), "PTRACE_SETREGS")
        finally:
            with contextlib.suppress(OSError):
                check(_ptrace(_PTRACE_DETACH, pid, None, None), "PTRACE_DETACH")
    except ProcessLookupError:
        raise
    except OSError as error:
        raise InjectionFailed(f"pid {pid}: {error}") from error
    finally:
        os.close(pidfd)


def _seize(pid: int) -> None:
    options = _PTRACE_O_SUSPEND_SECCOMP if _has_seccomp(pid) else 0
    check(_ptrace(_PTRACE_SEIZE, pid, None, options), f"PTRACE_SEIZE {pid}")
    check(_ptrace(_PTRACE_INTERRUPT, pid, None, None), f"PTRACE_INTERRUPT {pid}")
    _wait_stop(pid)


def _wait_stop(pid: int) -> int:
    while True:
        try:
            waited, status = os.waitpid(pid, _WALL)
        except ChildProcessError as error:
            raise InjectionFailed(f"pid {pid} is no longer traced by us") from error
        if waited == pid:
            break
    if not os.WIFSTOPPED(status):
        raise ProcessLookupError(f"pid {pid} ended while it was being stopped")
    return os.WSTOPSIG(status)


def _run(pid: int, saved: _Registers, instruction: int, number: int, argument: int) -> int:
    """Single-steps one system call with one argument; returns its result (negative errno on failure)."""
    registers = _Registers.from_buffer_copy(saved)
    # orig_rax = -1: the kernel must not take our register change for a system call to restart.
    registers.orig_rax = 0xFFFFFFFFFFFFFFFF
    registers.rax = number
    registers.rdi = argument
    registers.rip = instruction
    pending: list[int] = []
    try:
        check(_ptrace(_PTRACE_SETREGS, pid, None, ctypes.addressof(registers)), "PTRACE_SETREGS")
        for _ in range(16):
            check(_ptrace(_PTRACE_SINGLESTEP, pid, None, None), "PTRACE_SINGLESTEP")
            stop = _wait_stop(pid)
            check(_ptrace(_PTRACE_GETREGS, pid, None, ctypes.addressof(registers)), "PTRACE_GETREGS")
            if stop == signal.SIGTRAP and registers.rip == instruction + len(_SYSCALL_INSTRUCTION):
                return ctypes.c_longlong(registers.rax).value
            if stop not in (signal.SIGTRAP, signal.SIGSTOP):
                # A signal meant for the process came first: keep it, deliver it again when we are done.
                pending.append(stop)
        raise InjectionFailed(f"pid {pid} did not reach the end of system call {number} in 16 stops")
    finally:
        for number_ in pending:
            os.kill(pid, number_)


def _has_seccomp(pid: int) -> bool:
    with open(f"/proc/{pid}/status") as status:
        return any(line.startswith("Seccomp:") and line.split()[1] != "0" for line in status)


def _find_syscall_instruction(pid: int) -> int:
    with open(f"/proc/{pid}/maps") as maps:
        for line in maps:
            if line.rstrip().endswith("[vdso]"):
                start, end = (int(part, 16) for part in line.split()[0].split("-"))
                buffer = memoryview(bytearray(end - start))
                size = syscalls.process_vm_readv(pid, [(start, end)], buffer)
                at = bytes(buffer[:size]).find(_SYSCALL_INSTRUCTION)
                if at >= 0:
                    return start + at
    raise InjectionFailed(f"pid {pid} maps no vDSO with a syscall instruction")
