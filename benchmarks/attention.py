"""Attention, cache and decode: every figure of ``attention_cases``, each case a process of its own.

    python benchmarks/attention.py --json
    python benchmarks/attention.py --only scenes windows

Each case is a script that prints one JSON value with ``--json``; a new file in the folder is a new case. What
is compared takes turns within one process, so that whatever else the machine is doing falls on both; figures
are ratios, medians over the rounds. The exit status is that of the worst case.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

CASES = Path(__file__).with_name("attention_cases")


def names() -> list[str]:
    """The cases, by the names of their files."""
    return sorted(path.stem for path in CASES.glob("[!_]*.py"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--only", nargs="+", choices=names(), default=names(), help="cases to run")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    args = parser.parse_args()
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    results: dict[str, object] = {"threads": args.threads, "load_before": round(os.getloadavg()[0], 2)}
    worst = 0
    for name in args.only:
        command = [sys.executable, str(CASES / f"{name}.py"), *(["--json"] if args.json else [])]
        start = time.perf_counter()
        done = subprocess.run(command, env=environment, text=True, check=False, stdout=subprocess.PIPE)
        worst = max(worst, abs(done.returncode))
        if not args.json:
            print(f"--- {name}, {time.perf_counter() - start:.0f} s\n{done.stdout}", flush=True)
        elif done.returncode == 0:
            results[name] = json.loads(done.stdout)
    if args.json:
        print(json.dumps(results, indent=1))
    sys.exit(worst)


if __name__ == "__main__":
    main()
