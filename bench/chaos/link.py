"""What can go wrong with a wire: cut, one way only, slow. Of two hosts, or of one host and NATS.

nftables in the hosts' own namespaces, a table of ours that is gone when the fault is over.
"""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from whimbrel.controller.demo.cluster import Cluster
    from whimbrel.controller.demo.topology import DemoHost

TABLE = "whimbrel-chaos"
TIMEOUT_S = 20.0


def _run(host: DemoHost, *argv: str, stdin: str = "", check: bool = True) -> None:
    subprocess.run(
        host.enter(list(argv)), input=stdin, text=True, capture_output=True, timeout=TIMEOUT_S, check=check
    )


def _drop(host: DemoHost, incoming: str, outgoing: str) -> None:
    rules = f"table inet {TABLE} {{\n"
    if incoming:
        rules += f"chain i {{ type filter hook input priority -300; {incoming} drop; }}\n"
    if outgoing:
        rules += f"chain o {{ type filter hook output priority -300; {outgoing} drop; }}\n"
    _run(host, "nft", "-f", "-", stdin=rules + "}\n")


def _device(cluster: Cluster, host: DemoHost) -> str:
    prefix = host.netns.rpartition("-")[0]
    return f"{prefix}-ab" if host.name == "a" else f"{prefix}-ba"


def cut_between_hosts(cluster: Cluster) -> None:
    """Nothing crosses, in either direction."""
    host = cluster.hosts["a"]
    device = _device(cluster, host)
    _drop(host, f"iifname {device}", f"oifname {device}")


def cut_one_way(cluster: Cluster, sender: str) -> None:
    """Whatever `sender` sends to the other host is lost; the other way is whole."""
    host = cluster.hosts[sender]
    _drop(host, "", f"oifname {_device(cluster, host)}")


def cut_from_nats(cluster: Cluster, host: str) -> None:
    """Nothing crosses between that host's agent and the NATS server; its workloads are reached as ever."""
    port = cluster.nats_url.rpartition(":")[2]
    _drop(cluster.hosts[host], f"tcp sport {port}", f"tcp dport {port}")


def mend(cluster: Cluster) -> None:
    """Ends every cut; harmless where there is none."""
    for host in cluster.hosts.values():
        _run(host, "nft", "delete", "table", "inet", TABLE, check=False)


def shape(cluster: Cluster, mbit: float) -> None:
    """The rate of the link between the hosts, in both directions."""
    for host in cluster.hosts.values():
        device = _device(cluster, host)
        shaping = f"tbf rate {mbit}mbit burst {max(16384, int(mbit * 1e6 / 8 / 500))} latency 20ms"
        subprocess.run(
            ["tc", "-n", host.netns, "qdisc", "replace", "dev", device, "root", *shaping.split()],
            capture_output=True,
            timeout=TIMEOUT_S,
            check=True,
        )
