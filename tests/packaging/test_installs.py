"""Wheel, sdist→wheel and editable install, each for real: built, installed into a fresh environment, run.

No network: an environment gets the dependencies of this one by a .pth file, which does not bring the
editable whimbrel of this one with it (nested .pth files are not read).
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SITE = Path(sysconfig.get_path("purelib"))
CLEAN = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
TIMEOUT_S = 100
PLAIN = ("msgspec", "nats")


def call(*argv: str | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(word) for word in argv],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=CLEAN,
        cwd="/",
        check=False,
    )
    assert done.returncode == status, f"{argv}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def environment(folder: Path, dependencies: Path) -> Path:
    """A virtual environment without pip whose imports also look into `dependencies`; its bin folder."""
    call(sys.executable, "-m", "venv", "--without-pip", folder)
    (site,) = folder.glob("lib/python3*/site-packages")
    (site / "dependencies.pth").write_text(f"{dependencies}\n")
    return folder / "bin"


def install(bin_dir: Path, *what: str | Path) -> None:
    call(
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", bin_dir / "python"),
        *("install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"),
        *what,
    )


def modules_of_the_tree() -> set[str]:
    found = {"whimbrel", "whimbrel.__main__", "whimbrel.terminal"}
    for part in ("controller", "agent", "events"):
        for path in (ROOT / part).rglob("*.py"):
            dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found.add("whimbrel." + dotted.removesuffix(".__init__"))
    return found


def modules_of_the_wheel(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".py")]
    return {name.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for name in names}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Paths of the wheel built from the tree and of the one built from the sdist."""
    out = tmp_path_factory.mktemp("dist")
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir")
    call(*build, out / "direct", "--wheel", ROOT)
    call(*build, out / "through-sdist", ROOT)  # sdist first, then the wheel from what is in it
    (direct,) = (out / "direct").glob("*.whl")
    (through,) = (out / "through-sdist").glob("*.whl")
    return {"wheel": direct, "sdist": through}


def check(bin_dir: Path, home: Path) -> None:
    """It runs from anywhere, is the one under `home`, and knows the commands of all three parts."""
    said = call(bin_dir / "whimbrel", "--version").stdout
    assert said.startswith("whimbrel 0.")
    assert call(bin_dir / "python", "-m", "whimbrel", "--version").stdout == said
    helped = call(bin_dir / "whimbrel", "--help").stdout
    assert "migrate" in helped
    assert "agent" in helped
    code = "import whimbrel.events.bus as b, whimbrel.agent.doctor as d; print(b.__file__); print(d.__file__)"
    for path in call(bin_dir / "python", "-c", code).stdout.split():
        assert Path(path).resolve().is_relative_to(home), path


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_a_wheel_installs_and_runs(built: dict[str, Path], kind: str, tmp_path: Path) -> None:
    bin_dir = environment(tmp_path / "env", SITE)
    install(bin_dir, built[kind])
    check(bin_dir, tmp_path / "env")


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_a_wheel_carries_every_module(built: dict[str, Path], kind: str) -> None:
    assert modules_of_the_wheel(built[kind]) == modules_of_the_tree()


def test_the_wheel_carries_licence_and_typing_marker(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built["sdist"]) as archive:
        names = archive.namelist()
    assert "whimbrel/py.typed" in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_an_editable_install_runs_from_the_checkout(tmp_path: Path) -> None:
    bin_dir = environment(tmp_path / "env", SITE)
    install(bin_dir, "--editable", ROOT)
    check(bin_dir, ROOT)


def test_a_plain_install_reads_events_and_names_the_extras(built: dict[str, Path], tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for name in PLAIN:
        (few / name).symlink_to(SITE / name)
    bin_dir = environment(tmp_path / "env", few)
    install(bin_dir, built["wheel"])
    call(bin_dir / "python", "-c", "import whimbrel.events.facts, whimbrel.events.bus")
    assert call(bin_dir / "whimbrel", "--version").stdout.startswith("whimbrel ")
    refused = call(bin_dir / "whimbrel", "ps", status=2)
    assert "whimbrel[controller]" in refused.stderr
    assert "Traceback" not in refused.stderr
