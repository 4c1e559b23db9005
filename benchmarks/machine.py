"""Where and when a figure was measured, and whether the machine was alone."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUSY = 0.1  # of the cores' time: from then on a machine is not alone
CODE = ("csrc", "kernels", "promoe", "benchmarks/*.py", "benchmarks/*.c", "setup.py")  # what a figure depends on


def _git(*arguments):
    run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else ""


def commit():
    """The commit of this tree, with "+" when its code has changes; "unknown" outside git."""
    head = _git("rev-parse", "--short=12", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", *CODE)
    return head + "+" * bool(changes) if head else "unknown"


def processor():
    """The name that the CPU gives itself."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _ticks():
    """(ticks that the cores were not idle, all ticks), since the machine began; with those the host took away."""
    user, nice, system, idle, wait, *rest = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    return user + nice + system + sum(rest[:3]), user + nice + system + idle + wait + sum(rest[:3])


def load(seconds=0.5):
    """Share of the cores' time that others use while this process sleeps; a guess where the system does not say."""
    try:
        before = _ticks()
        time.sleep(seconds)
        busy, whole = (after - first for after, first in zip(_ticks(), before))
        return busy / whole if whole else 0.0
    except OSError:
        return min(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def describe(threads=None):
    """What stands at the head of every result; says aloud when the machine is not alone."""
    import promoe

    busy = load()
    if busy > BUSY:
        print(f"note: the machine is not alone (others use {100 * busy:.0f} % of its cores): shares of the peak are "
              f"rough, seconds mean little", file=sys.stderr)
    return {
        "processor": processor(), "cores": os.cpu_count(), "level": promoe.backend_info()["level"],
        "threads": threads or promoe.get_num_threads(), "others": round(busy, 2), "alone": busy <= BUSY,
        "promoe": promoe.__version__, "commit": commit(), "python": platform.python_version(),
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
