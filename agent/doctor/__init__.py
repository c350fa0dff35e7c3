"""What this machine has of what a migration needs, found out by trying it."""

from whimbrel.agent.doctor.findings import Finding, Verdict, blocking
from whimbrel.agent.doctor.probe import probe

__all__ = ["Finding", "Verdict", "blocking", "probe"]
