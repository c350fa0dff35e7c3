"""The Linux calls that Python 3.11 has no function for, each as one typed function that raises OSError.

Everything here is x86-64 and arm64 safe except ptrace register access, which lives in memory/inject.py.
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long

# asm-generic numbers: the same on every architecture for calls newer than Linux 5.0.
_NR_OPEN_TREE: Final = 428
_NR_MOVE_MOUNT: Final = 429
_NR_PIDFD_OPEN: Final = 434
_NR_PIDFD_GETFD: Final = 438
_NR_KCMP: Final = 312 if os.uname().machine == "x86_64" else 272
_KCMP_VM: Final = 1

CLONE_NEWNS: Final = 0x00020000
_AT_FDCWD: Final = -100
_OPEN_TREE_CLONE: Final = 1
_MOVE_MOUNT_F_EMPTY_PATH: Final = 0x00000004
_MNT_DETACH: Final = 2
_PR_SET_CHILD_SUBREAPER: Final = 36
_PR_SET_PDEATHSIG: Final = 1


def check(result: int, what: str) -> int:
    """Returns `result`; raises OSError naming `what` where it is negative."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def pidfd_open(pid: int) -> int:
    return check(_syscall(_NR_PIDFD_OPEN, pid, 0), f"pidfd_open({pid})")


def pidfd_getfd(pidfd: int, fd: int) -> int:
    return check(_syscall(_NR_PIDFD_GETFD, pidfd, fd, 0), f"pidfd_getfd(fd {fd})")


def same_memory(pid: int, other: int) -> bool:
    """Whether two processes share one address space (vfork, CLONE_VM); False where one of them is gone."""
    return int(_syscall(_NR_KCMP, pid, other, _KCMP_VM, 0, 0)) == 0


def open_tree_clone(path: str) -> int:
    """A detached bind mount of `path`, as a descriptor that can be attached in another mount namespace."""
    flags = ctypes.c_uint(_OPEN_TREE_CLONE | os.O_CLOEXEC)
    return check(_syscall(_NR_OPEN_TREE, _AT_FDCWD, path.encode(), flags), f"open_tree({path})")


def move_mount(tree_fd: int, path: str) -> None:
    """Attaches what `open_tree_clone` returned on top of `path`."""
    check(
        _syscall(_NR_MOVE_MOUNT, tree_fd, b"", _AT_FDCWD, path.encode(), _MOVE_MOUNT_F_EMPTY_PATH),
        f"move_mount onto {path}",
    )


def umount_detach(path: str) -> None:
    check(_libc.umount2(path.encode(), _MNT_DETACH), f"umount2({path})")


def bind_mount(source: str, target: str) -> None:
    ms_bind = 0x1000
    check(_libc.mount(source.encode(), target.encode(), None, ms_bind, None), f"bind {source} on {target}")


def set_child_subreaper() -> None:
    check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl(PR_SET_CHILD_SUBREAPER)")


def die_with_parent(signal_number: int) -> None:
    check(_libc.prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_vm_readv = _libc.process_vm_readv
_vm_readv.restype = ctypes.c_ssize_t
_vm_readv.argtypes = (
    ctypes.c_int,
    ctypes.POINTER(_Iovec),
    ctypes.c_ulong,
    ctypes.POINTER(_Iovec),
    ctypes.c_ulong,
    ctypes.c_ulong,
)

IOV_MAX: Final = 1024


def process_vm_readv(pid: int, runs: list[tuple[int, int]], buffer: memoryview) -> int:
    """Reads at most IOV_MAX `runs` (start, end) of `pid` back to back into `buffer`; returns bytes read.

    Fewer than asked: the run in which it stopped is not readable. Raises OSError when nothing was."""
    remote = (_Iovec * len(runs))()
    total = 0
    for slot, (start, end) in zip(remote, runs, strict=True):
        slot.base = start
        slot.length = end - start
        total += end - start
    anchor = (ctypes.c_char * total).from_buffer(buffer)
    local = _Iovec(ctypes.addressof(anchor), total)
    return check(
        _vm_readv(pid, ctypes.byref(local), 1, remote, len(runs), 0),
        f"process_vm_readv(pid {pid}, {len(runs)} runs from {runs[0][0]:#x})",
    )
