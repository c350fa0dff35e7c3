"""A family of processes that share, talk, spawn and die, and check each other all the time.

    python family.py --port P --seed S [--children 3] [--dir DIR] [--deleted-file] [--file-lock]
                     [--no-named-socket] [--periodic-timerfd]

Lines on TCP, answered by the parent: `check` → `ok <ops> <digest>` or `bad <what> <where> expected … found …`
from all members; it also demands that every kind of activity goes on, so a timer or a wake-up lost in a
restore is found. `stats` → JSON; `pause`, `go` → `ok`. `--memory-mib` and `--ops-per-s` are taken so that all
workloads start alike.

Each member has a main thread with timers and an epoll, and threads that send, receive, spawn, change memory
and append to a file. Sharing: anonymous shared memory and a memfd with semaphores in them, private pages
inherited over fork, pipes, unix stream and packet pairs, named unix sockets, queued real-time signals.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import os
import signal
import socket
import threading
import traceback
from collections import Counter
from pathlib import Path

import family_channels
import family_named_socket
from family_member import CONTROL_BYTES_MAX, PARENT, QUEUED_SIGNAL, Inheritance, Member
from family_memory import CopyOnWrite, Segment
from line_server import LineServer

CONTROL_SECONDS_MAX = 25.0


class Parent:
    """Answers for the whole family."""

    def __init__(self, member: Member, children: dict[int, socket.socket]) -> None:
        self._member = member
        self._children = children

    def answer(self, line: str) -> str:
        if line not in ("check", "stats", "pause", "go"):
            return f"error expected check, stats, pause or go, found {line!r}"
        replies: list[str] = []
        failures: list[str] = []
        for number, control in self._children.items():  # all at once: each may take a while
            try:
                control.send(line.encode())
            except OSError as failure:
                failures.append(f"member member-{number} expected alive found {failure!r}")
        replies.append(self._member.control(line))
        for number, control in self._children.items():
            try:
                reply = control.recv(CONTROL_BYTES_MAX).decode()
            except OSError as failure:
                reply = ""
                failures.append(f"member member-{number} expected an answer found {failure!r}")
            if not reply:
                failures.append(f"member member-{number} expected an answer found end-of-file")
            replies.append(reply)
        failures += [reply for reply in replies if line == "check" and reply not in ("ok", "")]
        if failures:
            # A dead or damaged member stalls others: the cause first, what follows from it last.
            return "bad " + " | ".join(sorted(failures, key=lambda failure: failure.startswith("stalled ")))
        if line == "check":
            counts = self._counts()
            digest = hashlib.blake2b(json.dumps(counts, sort_keys=True).encode(), digest_size=16)
            return f"ok {sum(counts.values())} {digest.hexdigest()}"
        return self._stats(replies) if line == "stats" else "ok"

    def _counts(self) -> Counter[str]:
        return Counter(self._member.record.counts)

    def _stats(self, replies: list[str]) -> str:
        members = [json.loads(reply) for reply in replies]
        kinds: Counter[str] = Counter()
        for member in members:
            kinds.update(member["counts"])
        pids = [member["pid"] for member in members]
        rss_kib = sum(_rss_kib(pid) for pid in pids)
        return json.dumps(
            {
                "ops": sum(kinds.values()),
                "kinds": kinds,
                "pids": pids,
                "memory_mib": rss_kib / 1024,
                "members": members,
            }
        )


def _rss_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    return 0


def inherit(options: argparse.Namespace) -> Inheritance:
    members = options.children + 1
    named_path: Path = options.dir / f"family-{options.seed}.sock"
    return Inheritance(
        seed=options.seed,
        members=members,
        directory=options.dir,
        segments=(Segment(options.seed, members, "shared"), Segment(options.seed, members, "memfd")),
        cow=CopyOnWrite(options.seed),
        channels=family_channels.open_ring(options.seed, members),
        control=[socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(members)],
        named_listener=family_named_socket.listen(named_path) if options.named_socket else None,
        named_path=named_path,
        deleted_file=options.deleted_file,
        file_lock=options.file_lock,
        alarm=not options.without_alarm,
        periodic_timerfd=options.periodic_timerfd,
    )


def live_as_child(number: int, inherited: Inheritance, parent_pid: int) -> None:
    """Never returns."""
    try:
        for other, (parents_end, members_end) in enumerate(inherited.control):
            parents_end.close()
            if other != number:
                members_end.close()
        member = Member(number, inherited, {PARENT: parent_pid})
        member.start()
        control = inherited.control[number][1]
        threading.Thread(target=member.obey_for_ever, args=(control,), daemon=True).start()
        member.tick_for_ever()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(4)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--children", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=Path("/tmp"), help="same path at the target")
    parser.add_argument("--deleted-file", action="store_true", help="also write to a file without a name")
    parser.add_argument("--file-lock", action="store_true", help="hold an flock on each file")
    parser.add_argument("--without-alarm", action="store_true", help="to see that a lost timer is missed")
    # CRIU 4.2.1 restores a periodic timerfd that has expired and was not yet read (as happens to most in the
    # freeze itself) without a next expiry: it ticks once more and never again. Hence not the default.
    parser.add_argument(
        "--periodic-timerfd", action="store_true", help="do not re-arm the timerfd at each tick"
    )
    parser.add_argument("--named-socket", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--memory-mib", type=int)
    parser.add_argument("--ops-per-s", type=float)
    options = parser.parse_args()
    faulthandler.enable()  # a member that crashes says where in the log
    signal.pthread_sigmask(signal.SIG_BLOCK, {QUEUED_SIGNAL})  # all processes and threads inherit this
    inherited = inherit(options)
    parent_pid = os.getpid()
    pids = {}
    for number in range(1, inherited.members):
        pids[number] = os.fork()
        if pids[number] == 0:
            live_as_child(number, inherited, parent_pid)
    for _parents_end, members_end in inherited.control:
        members_end.close()
    member = Member(PARENT, inherited, pids)
    member.start()
    children = {}
    for number in pids:
        children[number] = inherited.control[number][0]
        children[number].settimeout(CONTROL_SECONDS_MAX)
    server = LineServer(options.port, Parent(member, children).answer)

    def serve_for_ever() -> None:
        while True:
            server.serve(1.0)

    threading.Thread(target=serve_for_ever, daemon=True).start()
    member.tick_for_ever()


if __name__ == "__main__":
    main()
