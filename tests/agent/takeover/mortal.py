"""Fault servers in processes of their own, which tests kill at will."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from tests.agent.memory.test_faults import SPACE, Filling

from whimbrel.agent.memory.fault_process import FaultProcess
from whimbrel.agent.memory.ledger import Base, Ledger
from whimbrel.agent.memory.serving import FILL_FOLDER, HELD_PREFIX
from whimbrel.agent.memory.table import ServerRecord, Standing

if TYPE_CHECKING:
    from pathlib import Path

    from tests.agent.memory.children import Child

    from whimbrel.agent.capsule.capsule import Capsule
    from whimbrel.agent.mover.channel import Filled

SERVER_TIMEOUT_S = 20.0

DIES_HAVING_READ = """
import os, select, signal, sys
from pathlib import Path
from whimbrel.agent.memory.ledger import Ledger
from whimbrel.agent.memory.serving import Keeper
from whimbrel.agent.memory.table import ServerRecord, Standing, share_table
capsule, wanted = Path(sys.argv[1]), int(sys.argv[2])
record = ServerRecord.of_this_process(share_table())
record.write(capsule / "fill", Standing.SERVING)
fd = Keeper(capsule / "keeper.sock").fetch()["7"]
ledger = Ledger.load(capsule / "fill", "7")
poller = select.poll()
poller.register(fd, select.POLLIN)
print("ready", flush=True)
while True:
    poller.poll()
    if any(event.kind == wanted for _, event in ledger.read(fd)):
        os.kill(os.getpid(), signal.SIGKILL)
"""
"""Killed in the moment in which an event of the wanted kind is read, with nothing done about it."""


class Mortal(Filling):
    """One child with missing memory; its userfaultfd is with a keeper, its debt in a ledger."""

    def __init__(self, child: Child, capsule: Capsule, store: Path) -> None:
        super().__init__(child, store)
        self.capsule = capsule
        self.folder = capsule.folder / FILL_FOLDER
        self.processes = [FaultProcess(capsule, store)]
        self.deaths = 0

    def hand_over(self) -> None:
        """What is owed, on disk; nobody serves it yet."""
        self.store.sync()
        self.folder.mkdir()
        base = Base(SPACE, self.store.data_pages(SPACE).pack(), b"", [])
        Ledger.create(self.folder, str(SPACE), base).close()
        fd = self.take_userfault()
        self.capsule.call("hold", [fd], names=[f"{HELD_PREFIX}{SPACE}"])
        os.close(fd)

    @property
    def process(self) -> FaultProcess:
        return self.processes[-1]

    def change_worker(self) -> None:
        """The end of the worker that started the server, as the server sees it."""
        self.process.stop()
        self.processes.append(FaultProcess(self.capsule, self.store.directory))

    def begin(self) -> None:
        """A server, and a successor for each that is killed."""
        self.process.take_over()

    def serving_pid(self) -> int:
        """Pid of the one that serves now; waits for it."""
        deadline = time.monotonic() + SERVER_TIMEOUT_S
        while True:
            for record in ServerRecord.load_all(self.folder):
                if record.standing is Standing.SERVING and (pidfd := record.open_server()) is not None:
                    os.close(pidfd)
                    return record.pid
            assert time.monotonic() < deadline, "no fault server serves"
            time.sleep(0.001)

    def kill_server(self) -> None:
        pidfd = os.pidfd_open(self.serving_pid())
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert select.select([pidfd], [], [], SERVER_TIMEOUT_S)[0]
        os.close(pidfd)
        self.deaths += 1

    def let_one_die_having_read(self, kind: int) -> subprocess.Popen[str]:
        """Serves nothing; dies when it has read an event of this kind."""
        program = [sys.executable, "-c", DIES_HAVING_READ, str(self.capsule.folder), str(kind)]
        process = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        with process.stdout:
            assert process.stdout.readline() == "ready\n"
        return process

    def filled(self) -> Filled:
        return self.process.wait_filled()

    def close(self) -> None:
        for process in self.processes:
            process.stop()
            process.end_servers()
            if process._process is not None:
                process._process.wait(SERVER_TIMEOUT_S)
        super().close()
