"""A capsule is made, used and removed as a whole; its keeper lives through anything that is sent to it."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from whimbrel.agent import syscalls
from whimbrel.agent.capsule.capsule import FILES_MOUNT, FIRST_PID, LOG_NAME, Capsule, CapsuleError
from whimbrel.agent.capsule.keeper import FDS_MAX
from whimbrel.events.records import WorkloadSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    MakeCapsule = Callable[..., Capsule]


def spec(*argv: str, **fields: Any) -> WorkloadSpec:
    return WorkloadSpec(name="one", argv=argv, **fields)


def python(source: str, **fields: Any) -> WorkloadSpec:
    return spec(sys.executable, "-S", "-c", source, **fields)


def next_word(connection: socket.socket) -> dict[str, Any]:
    word: dict[str, Any] = json.loads(connection.recv(65536) or b"{}")
    return word


def run_to_end(capsule: Capsule, workload: WorkloadSpec) -> int:
    """Exit code as the keeper tells it on a watch."""
    capsule.start(workload)
    connection, said = capsule.watch(20.0)
    with connection:
        code = said["exit_code"]
        return int(code if code is not None else next_word(connection)["exit_code"])


def log_of(capsule: Capsule) -> str:
    return (capsule.files / LOG_NAME).read_text()


def count_fds(capsule: Capsule) -> int:
    """What the keeper holds open once it has noticed that all clients (this question, too) have hung up."""
    folder = Path(f"/proc/{capsule.keeper_pid()}/fd")
    while True:
        names = os.listdir(folder)
        with contextlib.suppress(FileNotFoundError):
            if sum(os.readlink(folder / name).startswith("socket:") for name in names) == 1:
                return len(names)
        os.sched_yield()


def is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


# --- start and exit -----------------------------------------------------------------------------------


def test_a_workload_starts_with_its_own_pid_files_and_environment(capsule: Capsule) -> None:
    workload = python(
        "import os; print(os.getpid(), os.getcwd(), os.environ['COLOUR'], os.getsid(0) == os.getpid(), "
        "sorted(int(f) for f in os.listdir('/proc/self/fd'))[:3], os.readlink('/proc/self/fd/1'))",
        env={"COLOUR": "blue"},
        cwd="/usr",
    )
    assert run_to_end(capsule, workload) == 0
    expected = f"{FIRST_PID} /usr blue True [0, 1, 2] {FILES_MOUNT / LOG_NAME}\n"
    assert log_of(capsule) == expected


def test_a_workload_inherits_no_descriptor_and_no_signal_of_the_keeper(capsule: Capsule) -> None:
    held = os.memfd_create("held")
    capsule.call("hold", [held], names=["kept"])
    os.close(held)
    workload = python(
        "import os; print([os.readlink(f'/proc/self/fd/{f}') for f in os.listdir('/proc/self/fd') if"
        " os.path.exists(f'/proc/self/fd/{f}')][3:]);"
        "print({l[:6]: int(l[7:], 16) for l in open('/proc/self/status') if l[:6] in ('SigIgn', 'SigBlk')})"
    )
    assert run_to_end(capsule, workload) == 0
    fds, signals = log_of(capsule).splitlines()
    assert fds == "[]"
    found = ast.literal_eval(signals)
    # Signals 32 and 33 are the C library's own: no call of ours can reset what we inherited of them.
    found["SigIgn"] &= ~(3 << 31)
    # Python itself ignores SIGPIPE (13) and SIGXFSZ (25).
    assert found == {"SigBlk": 0, "SigIgn": 1 << 12 | 1 << 24}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("raise SystemExit(0)", 0),
        ("raise SystemExit(3)", 3),
        ("import os; os.kill(os.getpid(), 9)", -9),
        ("import os; os.kill(os.getpid(), 15)", -15),
        ("import os; os.abort()", -6),
    ],
)
def test_the_watcher_hears_exit_codes_and_signals(capsule: Capsule, source: str, expected: int) -> None:
    assert run_to_end(capsule, python(source)) == expected
    assert capsule.call("status")["exit_code"] == expected


def test_every_watcher_hears_of_the_exit_and_a_late_one_at_once(capsule: Capsule) -> None:
    capsule.start(spec("sleep", "600"))
    watchers = [capsule.watch(20.0) for _ in range(5)]
    assert all(said["exit_code"] is None for _, said in watchers)
    watchers[2][0].close()  # one that went away disturbs nobody
    os.kill(capsule.cgroup.pids()[0], signal.SIGKILL)
    for index, (connection, _) in enumerate(watchers):
        if index != 2:
            assert next_word(connection)["exit_code"] == -9
            connection.close()
    late, said = capsule.watch(20.0)
    late.close()
    assert said["exit_code"] == -9


@pytest.mark.parametrize(
    ("workload", "words"),
    [
        (spec("/no/such/program"), "No such file"),
        (spec("no-such-program-anywhere"), "No such file"),
        (spec("/etc/passwd"), "Permission denied"),
        (spec("true", cwd="/no/such/folder"), "/no/such/folder"),
    ],
)
def test_what_cannot_be_executed_is_said_and_the_capsule_can_be_used_again(
    capsule: Capsule, workload: WorkloadSpec, words: str
) -> None:
    with pytest.raises(CapsuleError, match=words):
        capsule.start(workload)
    assert capsule.cgroup.pids() == []
    assert run_to_end(capsule, spec("true")) == 0


def test_a_second_workload_beside_a_living_one_is_refused(capsule: Capsule) -> None:
    capsule.start(spec("sleep", "600"))
    with pytest.raises(CapsuleError, match="already runs here as pid 1000"):
        capsule.start(spec("sleep", "600"))
    assert len(capsule.cgroup.pids()) == 1


def test_orphans_stay_in_the_tree_of_the_workload_and_are_reaped_with_it(capsule: Capsule) -> None:
    # The grandchild's parent ends: the workload, a subreaper, becomes its parent, not the keeper.
    source = (
        "import os, time\n"
        "read, write = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    if os.fork() == 0:\n"
        "        os.read(read, 1)\n"
        "        print('parent', os.getppid(), flush=True)\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "os.write(write, b'x')\n"
        "os.wait()\n"
        "if os.fork() == 0: time.sleep(600)\n"
        "if os.fork() == 0: os._exit(0)\n"
        "os._exit(5)\n"
    )
    assert run_to_end(capsule, python(source)) == 5
    assert log_of(capsule) == f"parent {FIRST_PID}\n"
    keeper = capsule.keeper_pid()
    children = Path(f"/proc/{keeper}/task/{keeper}/children")
    while True:  # the orphan that ended is reaped by the keeper; the one that sleeps is left
        with contextlib.suppress(FileNotFoundError):
            stats = [Path(f"/proc/{pid}/stat").read_text() for pid in children.read_text().split()]
            if [stat.rpartition(")")[2].split()[0] for stat in stats] == ["S"]:
                break
        os.sched_yield()


def test_two_capsules_do_not_see_each_other(make_capsule: MakeCapsule) -> None:
    see = python("import os; print(sorted(int(n) for n in os.listdir('/proc') if n.isdigit()))")
    first, second = make_capsule("one"), make_capsule("two")
    first.start(spec("sleep", "600"))
    assert run_to_end(second, see) == 0
    assert log_of(second) == f"[1, {FIRST_PID}]\n"
    assert log_of(first) == ""
    assert set(first.cgroup.pids()).isdisjoint(second.cgroup.pids())


# --- held descriptors and covered files ---------------------------------------------------------------


def test_held_descriptors_come_back_whole_to_whoever_asks(capsule: Capsule) -> None:
    made = [os.memfd_create(f"file {number}") for number in range(40)]
    for number, fd in enumerate(made):
        os.write(fd, b"%d" % number)
    for start in range(0, 40, 8):
        capsule.call(
            "hold", made[start : start + 8], names=[f"{number:03d}" for number in range(start, start + 8)]
        )
    for fd in made:
        os.close(fd)
    reply, fds = capsule.call_for_fds("held")
    assert reply["names"] == [f"{number:03d}" for number in range(40)]
    assert [os.pread(fd, 10, 0) for fd in fds] == [b"%d" % number for number in range(40)]
    for fd in fds:
        os.close(fd)
    capsule.call("release", names=["007", "never held"])
    assert "007" not in capsule.call("status")["held"]
    assert len(capsule.call("status")["held"]) == 39


def test_holding_a_name_again_replaces_it(capsule: Capsule) -> None:
    before = count_fds(capsule)
    for round_number in range(5):
        fd = os.memfd_create("x")
        os.write(fd, b"%d" % round_number)
        capsule.call("hold", [fd], names=["one"])
        os.close(fd)
    _, (fd,) = capsule.call_for_fds("held")
    assert os.pread(fd, 10, 0) == b"4"
    os.close(fd)
    assert count_fds(capsule) == before + 1


def test_names_and_descriptors_that_do_not_match_are_refused(capsule: Capsule) -> None:
    fd = os.memfd_create("x")
    with pytest.raises(CapsuleError, match="ValueError"):
        capsule.call("hold", [fd], names=["one", "two"])
    os.close(fd)


@pytest.mark.parametrize("count", [1, 40, 120])
def test_covered_files_show_the_cover_until_they_are_uncovered(capsule: Capsule, count: int) -> None:
    # As many as a workload of `count` processes needs; each cover is of another file than the next.
    pid = capsule.start(
        python(
            "import os, sys, time\n"
            f"for n in range({count} - 1):\n"
            "    if os.fork() == 0: time.sleep(600)\n"
            "print('ready', flush=True)\n"
            "time.sleep(600)\n"
        )
    )
    while "ready" not in log_of(capsule):
        os.sched_yield()
    inside = [pid + number for number in range(count)]
    paths, trees = [], []
    for number in inside:
        for name in ("pagemap", "smaps"):
            shown = capsule.images / f"{number}-{name}"
            shown.write_text(f"{number} {name}")
            paths.append(f"/proc/{number}/{name}")
            trees.append(syscalls.open_tree_clone(str(shown)))
    assert len(trees) <= FDS_MAX
    capsule.call("hide", trees, paths=paths)
    for tree in trees:
        os.close(tree)
    see = Path(f"/proc/{capsule.keeper_pid()}/root/proc")
    for number in inside:
        assert (see / f"{number}/smaps").read_text() == f"{number} smaps"
        assert (see / f"{number}/pagemap").read_text() == f"{number} pagemap"
    capsule.call("uncover", paths=paths)
    assert "VmFlags" in (see / f"{inside[-1]}/smaps").read_text()
    assert Path(f"/proc/{capsule.keeper_pid()}/mounts").read_text().count("/smaps") == 0


def test_let_run_undoes_everything_a_freeze_did(capsule: Capsule) -> None:
    pid = capsule.start(python("import time\nwhile True: print('tick', flush=True); time.sleep(0.001)"))
    capsule.write_role("source", "m-1")
    capsule.cgroup.freeze(5)
    shown = capsule.images / "cover"
    shown.write_text("covered")
    tree = syscalls.open_tree_clone(str(shown))
    capsule.call("hide", [tree], paths=[f"/proc/{pid}/smaps"])
    os.close(tree)
    joins = "echo 0 > $0; exec sleep 600"
    criu = subprocess.Popen(["/bin/sh", "-c", joins, str(capsule.criu_cgroup.procs)])
    while criu.pid not in capsule.criu_cgroup.pids():
        os.sched_yield()
    capsule.let_run()
    assert criu.wait(10) == -signal.SIGKILL
    assert capsule.read_role() is None
    assert not capsule.cgroup.is_frozen()
    size = len(log_of(capsule))
    while len(log_of(capsule)) == size:
        os.sched_yield()
    assert "VmFlags" in Path(f"/proc/{capsule.keeper_pid()}/root/proc/{pid}/smaps").read_text()


# --- what a keeper lives through ----------------------------------------------------------------------


def say_raw(capsule: Capsule, data: bytes) -> bytes:
    """One raw message; its answer, or nothing where the keeper hung up."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(10)
        connection.connect(str(capsule.keeper_socket))
        try:
            connection.send(data)
            return connection.recv(65536)
        except (ConnectionError, TimeoutError):
            return b""


def test_garbage_is_answered_and_never_ends_the_keeper(capsule: Capsule) -> None:
    capsule.start(spec("sleep", "600"))
    random_bytes = random.Random(20)
    garbage = [
        b"{",
        b"\xff\xfe\x00",
        b"null",
        b"[]",
        b"5",
        b'"op"',
        b"{}",
        b'{"op": null}',
        b'{"op": ["watch"]}',
        b'{"op": "no such thing"}',
        b'{"op": "hide", "paths": [5]}',
        b'{"op": "uncover", "paths": 5}',
        b'{"op": "uncover", "paths": [5]}',
        b'{"op": "uncover", "paths": ["\\ud800"]}',
        b'{"op": "adopt", "pid": "x"}',
        b'{"op": "adopt", "pid": 1e999}',
        b'{"op": "last_pid", "set": {"a": 1}}',
        b'{"op": "start"}',
        b"[" * 100_000,
        b'{"op":' * 20_000,
        *(random_bytes.randbytes(random_bytes.randrange(1, 2000)) for _ in range(200)),
    ]
    for data in garbage:
        answer = say_raw(capsule, data)
        assert not answer or "error" in json.loads(answer), data[:60]
    assert capsule.call("status")["exit_code"] is None


def test_random_requests_leave_the_keeper_alive_and_without_a_leak(capsule: Capsule) -> None:
    capsule.start(spec("sleep", "600"))
    choose = random.Random(21)
    values: list[Any] = [None, 0, -1, 2**70, 1.5, "", "x", "/", [], [1], ["a"], {}, {"a": []}, True]
    ops = ["status", "watch", "last_pid", "hide", "uncover", "hold", "held", "release", "start", "?", 7]
    fd = os.memfd_create("x")
    before = count_fds(capsule)
    for _ in range(400):
        request = {"op": choose.choice(ops)}
        for field in ("names", "paths", "pid", "argv", "env", "cwd", "log", "cgroup_procs"):
            if choose.random() < 0.4:
                request[field] = choose.choice(values)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(10)
            connection.connect(str(capsule.keeper_socket))
            message, fds = json.dumps(request).encode(), [fd] * choose.choice([0, 0, 1, 2])
            if fds:
                socket.send_fds(connection, [message], fds)
            else:
                connection.send(message)
            if choose.random() < 0.8:
                connection.recv(65536)
    os.close(fd)
    capsule.call("release", names=capsule.call("status")["held"])
    assert capsule.call("status")["exit_code"] is None
    assert count_fds(capsule) == before


def test_more_clients_than_it_takes_do_not_end_the_keeper(capsule: Capsule) -> None:
    capsule.start(spec("sleep", "600"))
    before = count_fds(capsule)
    with contextlib.ExitStack() as clients:
        for _ in range(300):
            client = clients.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            client.settimeout(10)
            with contextlib.suppress(BlockingIOError):  # refused by the kernel: too many wait
                client.connect(str(capsule.keeper_socket))
    assert count_fds(capsule) == before
    assert capsule.call("status")["exit_code"] is None


def test_clients_that_leave_at_any_moment_disturb_nobody(capsule: Capsule) -> None:
    capsule.start(spec("sleep", "600"))
    before = count_fds(capsule)

    def come_and_go() -> None:
        for number in range(50):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
                client.connect(str(capsule.keeper_socket))
                if number % 3:
                    client.send(b'{"op": "watch"}')

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert capsule.call("status")["exit_code"] is None
    assert count_fds(capsule) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE])
def test_no_polite_signal_ends_the_keeper(capsule: Capsule, number: signal.Signals) -> None:
    os.kill(capsule.keeper_pid(), number)
    assert capsule.call("status")["root"] is None


def test_a_keeper_that_does_not_answer_is_an_error_in_time_and_counts_as_alive(capsule: Capsule) -> None:
    keeper = capsule.keeper_pid()
    os.kill(keeper, signal.SIGSTOP)
    with pytest.raises(CapsuleError, match="timed out"):
        capsule.call("status", timeout_s=0.05)
    assert capsule.is_alive()  # or an agent that restarts on a busy host would throw its workload away
    os.kill(keeper, signal.SIGCONT)
    assert capsule.is_alive()


# --- the end ------------------------------------------------------------------------------------------


def assert_nothing_left(capsule: Capsule, pids: list[int]) -> None:
    assert not capsule.folder.exists()
    assert not capsule.cgroup.path.parent.exists()
    assert not any(is_there(pid) for pid in pids)
    assert str(capsule.folder) not in Path("/proc/self/mountinfo").read_text()
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()
    zombies = [pid for pid in children if " Z " in Path(f"/proc/{pid}/stat").read_text()]
    assert zombies == []


FORKING = "import os, time\nfor _ in range(3): os.fork()\nprint('x', flush=True)\ntime.sleep(600)"


@pytest.mark.parametrize("state", ["running", "frozen", "stopped", "empty", "criu", "keeper killed"])
def test_destroy_leaves_nothing_in_whatever_state(capsule: Capsule, state: str) -> None:
    pids = [capsule.keeper_pid()]
    helper = None
    if state != "empty":
        capsule.start(python(FORKING))
        while log_of(capsule).count("x") < 8:
            os.sched_yield()
        pids += capsule.cgroup.pids()
        assert len(pids) == 9
    if state == "frozen":
        capsule.cgroup.freeze(5)
    elif state == "stopped":
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
    elif state == "criu":
        helper = subprocess.Popen(["/bin/sh", "-c", f"echo 0 > {capsule.criu_cgroup.procs}; exec sleep 600"])
        while helper.pid not in capsule.criu_cgroup.pids():
            os.sched_yield()
    elif state == "keeper killed":
        pidfd = os.pidfd_open(pids[0])
        os.kill(pids[0], signal.SIGKILL)
        select.select([pidfd], [], [], 10)
        os.close(pidfd)
    capsule.destroy()
    if helper is not None:
        assert helper.wait(10) == -signal.SIGKILL
    assert_nothing_left(capsule, pids)
    capsule.destroy()  # harmless


def test_destroying_what_never_was_is_harmless(make_capsule: MakeCapsule) -> None:
    capsule = make_capsule("never", create=False)
    capsule.destroy()
    assert not capsule.exists()
    assert not capsule.is_alive()
    assert capsule.read_role() is None


def test_a_name_that_is_taken_is_refused_and_keeps_running(capsule: Capsule, root: Path) -> None:
    capsule.start(spec("sleep", "600"))
    with pytest.raises(CapsuleError, match=r"expected no capsule 'one'.*found .*stop that workload first"):
        Capsule(root, "a", "one").create()
    assert capsule.call("status")["exit_code"] is None


def test_a_capsule_can_be_made_again_at_once(make_capsule: MakeCapsule) -> None:
    for _ in range(5):
        capsule = make_capsule("again")
        assert capsule.start(spec("sleep", "600")) == FIRST_PID
        capsule.destroy()


@pytest.mark.parametrize("obstacle", ["no unshare", "keeper cannot start"])
def test_a_create_that_fails_says_why_and_leaves_nothing(
    make_capsule: MakeCapsule, monkeypatch: pytest.MonkeyPatch, obstacle: str
) -> None:
    capsule = make_capsule("broken", create=False)
    if obstacle == "no unshare":
        monkeypatch.setenv("PATH", "/nonexistent")
        words = "unshare"
    else:
        monkeypatch.setattr(sys, "executable", "/usr/bin/false")
        words = "keeper of broken ended"
    with pytest.raises(CapsuleError, match=words):
        capsule.create()
    assert_nothing_left(capsule, [])


def test_making_and_ending_many_leaks_no_descriptor_here(make_capsule: MakeCapsule) -> None:
    make_capsule("first").destroy()  # what is opened once and for all
    before = sorted(os.listdir("/proc/self/fd"))
    for number in range(4):
        capsule = make_capsule(f"n{number}")
        capsule.start(spec("sleep", "600"))
        connection, _ = capsule.watch()
        connection.close()
        capsule.destroy()
    assert sorted(os.listdir("/proc/self/fd")) == before
