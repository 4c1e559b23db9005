"""Result files: benchmarks/results/<date>-<level>-<commit>.json, with the machine at their head.

A file grows figure by figure, so that a run which was stopped goes on where it was: a figure that the file of this
level, thread count and commit has already is not measured again.
"""

import json
import time
from pathlib import Path

from benchmarks import machine

FOLDER = Path(__file__).resolve().parent / "results"


class Results:
    """The figures of one commit on one machine, by section ("steps", "official", ...) and key.

    `minutes`: no figure is begun later than that; what is left is in `late`."""

    def __init__(self, threads, folder=FOLDER, again=False, minutes=None):
        self.machine = machine.describe(threads)
        self.until = float("inf") if minutes is None else time.monotonic() + 60 * minutes
        self.late = []
        self.path = self._find(Path(folder), again)
        self.sections = {}
        if self.path.exists():
            held = json.loads(self.path.read_text())
            self.sections = {name: rows for name, rows in held.items() if name != "machine"}

    def _find(self, folder, again):
        """The file of a run like this one; a new name when there is none, or when it is to be measured anew.

        With changes that no commit has nothing can be continued."""
        m = self.machine
        name = f"{m['when'][:10]}-{m['level']}-{m['commit'].replace('+', '-changed')}"
        if not again and not m["commit"].endswith("+") and m["commit"] != "unknown":
            for path in sorted(folder.glob(f"*{name[10:]}*.json"), reverse=True):
                held = json.loads(path.read_text())["machine"]
                if all(held[k] == m[k] for k in ("processor", "cores", "level", "threads", "commit")):
                    return path
        path, other = folder / f"{name}.json", 1
        while path.exists():
            other += 1
            path = folder / f"{name}-{other}.json"
        return path

    def due(self, section, key):
        """Whether a figure is to be measured now: it is not there yet, and there is time."""
        if key in self.sections.get(section, {}):
            print(f"{key}: measured already")
            return False
        if time.monotonic() > self.until:
            self.late.append(f"{section}: {key}")
            return False
        return True

    def add(self, section, key, figures):
        """Keep the figures of one measurement, and how busy others were after it; written at once."""
        self.add_all(section, {key: figures})

    def add_all(self, section, rows):
        beside = {"when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "others": round(machine.load(), 2)}
        self.sections.setdefault(section, {}).update({key: {**row, **beside} for key, row in rows.items()})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps({"machine": self.machine, **self.sections}, indent=1) + "\n")
        part.replace(self.path)


def read(path):
    return json.loads(Path(path).read_text())


def newest(folder=FOLDER):
    """The file of the latest run, of those that have sections by key."""
    found = [(held["machine"]["when"], path) for path in Path(folder).glob("*.json")
             if isinstance((held := read(path)).get("steps"), dict)]
    if not found:
        raise FileNotFoundError(f"no results in {folder}: run python -m benchmarks")
    return max(found)[1]
