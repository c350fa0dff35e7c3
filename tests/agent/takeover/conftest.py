"""A process with missing memory and a capsule's keeper: what is left when fault servers die."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.agent.capsule.conftest import make_capsule as make_capsule
from tests.agent.capsule.conftest import root as root
from tests.agent.memory.conftest import child as child
from tests.agent.memory.conftest import family as family
from tests.agent.takeover.mortal import Mortal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.agent.capsule.conftest import MakeCapsule
    from tests.agent.memory.children import Child


@pytest.fixture
def mortal(child: Child, make_capsule: MakeCapsule, root: Path) -> Iterator[Mortal]:
    mortal = Mortal(child, make_capsule(), root / "store")
    yield mortal
    mortal.close()
