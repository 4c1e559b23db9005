"""A training folder: its lock, its log and its checkpoints.

    lock                       held while a trainer works here
    log.jsonl                  one line per logged step
    checkpoints/step_00001000  see checkpoint.py
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import warnings
from pathlib import Path

from promoe import checkpoint
from promoe.checkpoint import CheckpointError

__all__ = ["Log", "TrainingFolder"]


class Log:
    """Lines of JSON, one per logged step. A line that was cut off in the middle is not a line."""

    def __init__(self, path):
        self.path = Path(path)
        self._file = None

    def cut(self, step):
        """Drop everything after `step`, open for appending, and return the records that stay."""
        records, end = [], 0
        content = self.path.read_bytes() if self.path.exists() else b""
        for line in content.splitlines(keepends=True):
            try:
                record = json.loads(line)
                if not line.endswith(b"\n") or record["step"] > step:
                    break
            except (ValueError, KeyError, TypeError):
                break
            records.append(record)
            end += len(line)
        self._file = open(self.path, "ab", buffering=0)
        self._file.truncate(end)
        return records

    def append(self, record):
        """Write one record, at once."""
        self._file.write(json.dumps(record).encode() + b"\n")

    def sync(self):
        """Flush to the disk: a checkpoint never knows of a step that the log has lost."""
        if self._file:
            os.fsync(self._file.fileno())

    def close(self):
        if self._file:
            self._file.close()
            self._file = None


class TrainingFolder:
    """Opens, and locks, the folder of a run; made when it is not there.

    Raises
    ------
    CheckpointError
        When another trainer works here.
    """

    def __init__(self, path):
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(f"{self.path} is a file; give a folder for the run")
        (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        self._lock = open(self.path / "lock", "a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # freed by any death
        except OSError:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "another process"
            self._lock.close()
            raise CheckpointError(f"{self.path} is in use by {owner}: two trainers cannot share "
                                  f"a folder") from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()
        for left in (self.path / "checkpoints").glob(f"{checkpoint.TEMPORARY}*"):
            shutil.rmtree(left, ignore_errors=True)
        self.log = Log(self.path / "log.jsonl")
        self.saved_step = self._tried_step = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.log.close()
        self._lock.close()

    def newest(self):
        """The newest whole checkpoint as (manifest, state), or None when the folder is empty.

        Newer ones that are damaged are named in a warning. A folder that has something but no
        whole checkpoint is an error: a run never starts from scratch over another.
        """
        errors = []
        found = checkpoint.newest_checkpoint(self.path, errors.append)
        if found is None:
            strangers = sorted(p.name for p in self.path.iterdir()
                               if p.name not in ("lock", "checkpoints") and not _empty_log(p))
            strangers += sorted(p.name for p in (self.path / "checkpoints").iterdir())
            if strangers:
                why = "; ".join(map(str, errors)) or f"it has {', '.join(strangers[:4])}"
                raise CheckpointError(f"{self.path} is not empty and has no whole checkpoint to "
                                      f"continue from: {why}. Give another folder, or empty it")
            return None
        for error in errors:
            warnings.warn(f"{error}; continuing from {found[0].name}", RuntimeWarning, stacklevel=3)
        self.saved_step = self._tried_step = found[1]["step"]
        return found[1:]

    def save(self, model, manifest, keep_last):
        """Write the checkpoint of manifest["step"], then remove all but the newest `keep_last`.

        A step is tried once: on the way out of a failed save there is no second one.
        """
        step = manifest["step"]
        if self._tried_step != step:
            self._tried_step = step
            self.log.sync()
            path = self.path / "checkpoints" / f"step_{step:08d}"
            checkpoint.write_checkpoint(path, model.training_state(),
                                        {**checkpoint.describe(model), **manifest})
            self.saved_step = step
        if self.saved_step == step:
            self._prune(keep_last)

    def _prune(self, keep_last):
        whole = 0
        for path in checkpoint.checkpoints(self.path):
            try:
                step = checkpoint.read_manifest(path)["step"]
            except CheckpointError:
                continue  # a damaged one neither counts nor goes: its owner may want to look
            whole += step <= self.saved_step
            if whole > keep_last:
                checkpoint.remove_checkpoint(path)


def _empty_log(path):
    return path.name == "log.jsonl" and path.stat().st_size == 0


def differences(before, now, prefix=""):
    """Where two nested dicts of JSON types differ, in words."""
    found = []
    for key in sorted({*now, *(before if prefix else ())}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {old!r} there, {new!r} now")
    return found
