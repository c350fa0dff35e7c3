"""A restore around a page store, up to the moment in which the workload runs: the first time, and again where
the first came to nothing after the commit. Everything it needs is on disk: images, store, and `Final`."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Final

import msgspec

from whimbrel.agent.criu.images import lazy_part
from whimbrel.agent.criu.rpc import CriuRefused
from whimbrel.agent.memory.pageset import PageSet
from whimbrel.agent.mover import handover, pause

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from whimbrel.agent.capsule.capsule import Capsule
    from whimbrel.agent.criu.rpc import CriuWorker
    from whimbrel.agent.memory.fault_process import FaultProcess
    from whimbrel.agent.memory.store import PageStore

RESTORE_TIMEOUT_S: Final = 60.0
_FINAL_NAME: Final = "final"


class HandoverIncomplete(Exception):
    """What arrived is not all of what the source had; nothing may run here."""


def keep_final(folder: Path, content: bytes) -> None:
    """For a worker that has to restore again."""
    draft = folder / f"{_FINAL_NAME}.draft"
    draft.write_bytes(content)
    draft.rename(folder / _FINAL_NAME)


def load_final(folder: Path) -> handover.Final | None:
    """None before it came, and after `clear_away`."""
    try:
        return msgspec.msgpack.decode((folder / _FINAL_NAME).read_bytes(), type=handover.Final)
    except FileNotFoundError:
        return None


def clear_away(capsule: Capsule, store: Path) -> None:
    """What a finished migration does not need any more; `Final` last, so that it can be done again."""
    shutil.rmtree(store, ignore_errors=True)
    shutil.rmtree(capsule.images, ignore_errors=True)
    capsule.images.mkdir(exist_ok=True)
    (capsule.folder / _FINAL_NAME).unlink(missing_ok=True)


def restore(
    capsule: Capsule,
    store: PageStore,
    faults: FaultProcess,
    criu: CriuWorker,
    final: handover.Final,
    *,
    check: Callable[[dict[int, PageSet]], None],
    judge: Callable[[], bool],
) -> None:
    """Returns when the workload runs. `check` proves that all is here, beside CRIU; `judge` is asked when all
    processes exist and none has run. The pages must have been composed into the images. Closes `criu`.

    Raises CriuFailed, CapsuleError, and what the two raise."""
    images = capsule.images
    expected = {space: PageSet.unpack(pages) for space, pages in final.pages.items()}

    def let_run(criu_socket: int, message: bytes) -> None:
        capsule.call("resume", [criu_socket], pid=final.root_pid, message=message.hex())

    try:
        # CRIU first: what follows here goes on beside it.
        criu.begin_restore(images=images, lazy=final.lazy)
        pause.at("restoring")
        check(expected)
        if final.lazy:
            owed = {
                space: lazy_part(images, space, pages).intersection(store.data_pages(space))
                for space, pages in expected.items()
            }
            # Faults are served before the processes run: the kernel touches some pages for a restore.
            store.sync()
            faults.serve(owed, {space: PageSet.unpack(pages) for space, pages in final.hot.items()})
        criu.finish_restore(images, RESTORE_TIMEOUT_S, judge, let_run)
    except CriuRefused:
        capsule.call("resume_failed")
        raise
    finally:
        criu.close()


def prove_complete(store: PageStore, expected: dict[int, PageSet]) -> None:
    """Received = expected. Raises HandoverIncomplete."""
    for space, pages in expected.items():
        missing = store.missing(space, pages)
        if missing:
            raise HandoverIncomplete(
                f"process {space}: expected {len(pages)} pages, {len(missing)} of them never came, "
                f"first {next(missing.runs())[0]:#x}"
            )
