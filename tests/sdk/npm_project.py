"""A Node.js project of the repository, its packages kept under .cache: no network the second time."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INSTALL_S = 240


def _copy_sources(project: Path, folder: Path) -> None:
    for file in project.iterdir():
        if file.suffix in (".mjs", ".cjs"):
            shutil.copy(file, folder)


async def installed(project: Path) -> Path:
    """A folder with the project's files and its node_modules, named by the packages it has."""
    packages = hashlib.sha256((project / "package-lock.json").read_bytes()).hexdigest()[:16]
    kept = ROOT / ".cache" / "npm" / f"{project.name}-{packages}"
    if not (kept / "complete").exists():
        making = kept.with_name(f"{kept.name}.{os.getpid()}.making")
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(project / name, making)
        process = await asyncio.create_subprocess_exec(
            *("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"),
            cwd=making,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            async with asyncio.timeout(INSTALL_S):
                output, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode == 0, output.decode()
        (making / "complete").touch()
        shutil.rmtree(kept, ignore_errors=True)
        making.rename(kept)
    # Node looks for packages beside the real file, so the sources go there too.
    _copy_sources(project, kept)
    return kept
