"""Where and when a figure was measured, and whether the machine was alone."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUSY = 0.3  # load per core from which a machine is not alone


def _git(*arguments):
    run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else ""


def commit():
    """The commit of this tree, with "+" when it has changes; "unknown" outside git."""
    head = _git("rev-parse", "--short=12", "HEAD")
    return head + "+" * bool(_git("status", "--porcelain", "--untracked-files=no")) if head else "unknown"


def processor():
    """The name that the CPU gives itself."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def load():
    """Runnable threads per core over the last minute."""
    return os.getloadavg()[0] / (os.cpu_count() or 1)


def describe(threads=None):
    """What stands at the head of every result; says aloud when the machine is not alone."""
    import promoe

    busy = load()
    if busy > BUSY:
        print(f"note: the machine is not alone (load {busy:.2f} per core): shares of the peak are rough, "
              f"seconds mean little", file=sys.stderr)
    return {
        "processor": processor(), "cores": os.cpu_count(), "level": promoe.backend_info()["level"],
        "threads": threads or promoe.get_num_threads(), "load_per_core": round(busy, 2), "alone": busy <= BUSY,
        "promoe": promoe.__version__, "commit": commit(), "python": platform.python_version(),
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
