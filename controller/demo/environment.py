"""The environment of processes started here: they must import the same whimbrel as this one does."""

from __future__ import annotations

import os
from pathlib import Path

import whimbrel


def child_environment(**more: str) -> dict[str, str]:
    """Ours, with the folder that `whimbrel` was imported from first on the import path, and `more`."""
    root = str(Path(whimbrel.__file__).parent.parent)
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), **more}
