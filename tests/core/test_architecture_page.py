"""The state diagram in docs/architecture.md is the one that the transition table draws."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_diagram_in_the_docs_is_current() -> None:
    drawn = subprocess.run(
        [sys.executable, "-m", "whimbrel.controller.core.diagram"], capture_output=True, text=True, check=True
    ).stdout.strip()
    page = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text()
    assert f"```mermaid\n{drawn}\n```" in page, (
        "docs/architecture.md shows another diagram than `python -m whimbrel.controller.core.diagram` prints"
    )
