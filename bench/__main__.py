"""`make bench`: every benchmark of the project, one after the other, each with its JSON beside the others.

python -m bench [options of bench/downtime.py]
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


def main(argv: list[str]) -> int:
    RESULTS.mkdir(exist_ok=True)
    runs = [
        ["downtime.py", *argv],
        ["gate.py", "--json", str(RESULTS / "gate.json")],
        ["stream.py", "--json", str(RESULTS / "stream.json")],
    ]
    failed = []
    for script, *options in runs:
        print(f"== bench/{script}", flush=True)
        try:
            code = subprocess.run([sys.executable, str(HERE / script), *options], check=False).returncode
        except KeyboardInterrupt:
            return 130
        if code:
            failed.append(f"bench/{script} exit {code}")
    for failure in failed:
        print(failure, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
