"""Rules broken on purpose, each as somebody might write it by mistake; the simulation must notice all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from tests.sim.world import Rules, real_rules

from whimbrel.agent.core import rules
from whimbrel.agent.core.rules import Side, SourceAct, Then, Wish, Write
from whimbrel.events.records import Decision

if TYPE_CHECKING:
    from collections.abc import Callable


def _with(**changes: Any) -> Callable[[], Rules]:
    def make() -> Rules:
        mutated = real_rules()
        for name, change in changes.items():
            setattr(mutated, name, change)
        return mutated

    return make


def _thaws_by_itself(stored: Decision | None, *, frozen_late: bool, committed_for_s: float) -> SourceAct:
    if frozen_late:
        return SourceAct.THAW
    return rules.source_looks(stored, frozen_late=frozen_late, committed_for_s=committed_for_s)


def _releases_by_itself(stored: Decision | None, *, frozen_late: bool, committed_for_s: float) -> SourceAct:
    if stored is Decision.PREPARED and not frozen_late:
        return SourceAct.RELEASE
    return rules.source_looks(stored, frozen_late=frozen_late, committed_for_s=committed_for_s)


def _abort_wins_always(wish: Wish, stored: Decision | None, *, late: bool = False) -> Write:
    if wish is Wish.ABORT and stored is Decision.COMMITTED:
        return Write.ABORTED
    return rules.next_write(wish, stored, late=late)


def _commits_without_promise(wish: Wish, stored: Decision | None, *, late: bool = False) -> Write:
    if wish is Wish.COMMIT and stored is None and not late:
        return Write.COMMITTED
    return rules.next_write(wish, stored, late=late)


def _restarts_into_running(side: Side, stored: Decision, *, alive: bool) -> Then:
    if side is Side.SOURCE and alive:
        return Then.LET_RUN
    return rules.after_restart(side, stored, alive=alive)


def _restart_discards_target(side: Side, stored: Decision, *, alive: bool) -> Then:
    return Then.DESTROY if side is Side.TARGET else rules.after_restart(side, stored, alive=alive)


def _never_releases_alone(stored: Decision | None, *, frozen_late: bool, committed_for_s: float) -> SourceAct:
    return rules.source_looks(stored, frozen_late=frozen_late, committed_for_s=0.0)


MUTANTS: Final[dict[str, Callable[[], Rules]]] = {
    "source-thaws-on-timeout-without-the-register": _with(source_looks=_thaws_by_itself),
    "source-thaws-whatever-is-stored": _with(may_thaw=lambda stored: True),
    "source-restarts-into-running": _with(after_restart=_restarts_into_running),
    "source-is-released-once-it-has-promised": _with(source_looks=_releases_by_itself),
    "source-waits-for-a-release-for-ever": _with(source_looks=_never_releases_alone),
    "target-runs-before-the-commit": _with(may_run=lambda stored: stored is not Decision.ABORTED),
    "target-runs-whatever-is-stored": _with(may_run=lambda stored: True),
    "target-commits-without-a-promise": _with(next_write=_commits_without_promise),
    "target-is-discarded-whatever-is-stored": _with(may_discard=lambda stored: True),
    "target-is-discarded-at-a-restart": _with(
        after_restart=_restart_discards_target, found=lambda side, worker_waits: rules.Found.ASK_FOR_ABORT
    ),
    "abort-overwrites-committed": _with(next_write=_abort_wins_always),
    "late-prepare-begins": _with(may_begin=lambda stored: True),
    "committed-register-is-forgotten": _with(may_forget_register=lambda state: True),
    "takeover-that-lost-a-race-gives-up": _with(adopts=False),
    "takeover-restores-what-has-run-already": _with(keeper_knows=False),
    "dead-worker-after-the-commit-is-not-taken-over": _with(may_take_over=lambda stored, restored: False),
    "no-fence-around-criu": _with(fenced=False),
}
