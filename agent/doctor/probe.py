"""All findings about this machine, in the order in which they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from whimbrel.agent.doctor import kernel, machine

if TYPE_CHECKING:
    from whimbrel.agent.doctor.findings import Finding


def probe() -> list[Finding]:
    """Tries everything once; blocks for about 0.3 s, leaves nothing behind and never raises for a lack."""
    return [
        machine.kernel(),
        *machine.privileges(),
        kernel.write_tracking(),
        kernel.soft_dirty(),
        kernel.namespaces(),
        kernel.cgroup_freezer(),
        kernel.pipe_limits(),
        kernel.nftables(),
        machine.criu(),
        machine.store_space(),
        machine.clock(),
    ]
