"""Pid 1 of a test capsule: starts the workload as a session of its own on regular files, then reaps.

argv: LOG_FILE PROGRAM [ARGUMENT…], or nothing for a capsule that criu will restore into. Prints the
workload's pid (inside the namespace), or `ready`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

FIRST_PIDS_LEFT_FREE = 1000  # criu's own processes must not take a pid that a restore will need

watched = {signal.SIGCHLD, signal.SIGTERM}
signal.pthread_sigmask(signal.SIG_BLOCK, watched)
word = "ready"
if len(sys.argv) > 1:
    with open("/proc/sys/kernel/ns_last_pid", "w") as last_pid:
        last_pid.write(str(FIRST_PIDS_LEFT_FREE))
    with open(sys.argv[1], "wb", buffering=0) as log, open(sys.argv[1] + ".stdin", "w+b") as empty:
        workload = subprocess.Popen(
            sys.argv[2:],
            stdin=empty,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, watched),
        )
    word = str(workload.pid)
print(word, flush=True)
while signal.sigwait(watched) != signal.SIGTERM:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
