"""What `make mutants` found, module by module, and the change of every mutant that no test noticed.

Exits 1 where under 90% were killed. A mutant counts as killed by a failing test, by mypy, or by running out of time.
"""

import subprocess
import sys
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

MUTMUT = str(Path(sys.executable).with_name("mutmut"))
KILLED = {"killed", "timeout", "caught by type check"}
LEAST = 0.90


def mutmut(*arguments):
    return subprocess.run([MUTMUT, *arguments], capture_output=True, text=True, check=True).stdout


def main():
    found = dict(line.strip().rsplit(": ", 1) for line in mutmut("results", "--all", "true").splitlines() if ": " in line)
    by_module = defaultdict(Counter)
    for name, status in found.items():
        by_module[name.rpartition(".")[0]][status] += 1
    alive = [name for name, status in found.items() if status not in KILLED]
    with ThreadPoolExecutor() as pool:  # each is a process of a second
        for name, change in zip(alive, pool.map(partial(mutmut, "show"), alive), strict=True):
            print(f"\n{found[name]}: {name}\n{change}", flush=True)
    print(f"\n{'killed':>7} {'of':>6}  module")
    for module, counts in sorted(by_module.items()):
        print(f"{sum(counts[one] for one in KILLED):>7} {counts.total():>6}  {module}  {dict(counts)}")
    total = Counter(found.values())
    share = sum(total[one] for one in KILLED) / total.total()
    print(f"{share:.1%} of {total.total():,} mutants killed  {dict(total)}")
    return 0 if share >= LEAST else 1


if __name__ == "__main__":
    sys.exit(main())
