"""Checkpoints that are whole or not there.

A checkpoint is a directory: ``manifest.json`` (what the model is, where the run stands, a SHA-256
of every file) beside safetensors files. It is written under a temporary name, every file and
directory is flushed to the disk, and then renamed: whatever happens meanwhile (kill -9, power, a
full disk), a directory with its final name is complete, and the earlier ones are untouched.

    parameters.safetensors   official names
    ema.safetensors          official names
    optimizer.safetensors    exp_avg.NAME, exp_avg_sq.NAME

``save`` and ``load`` do one model in one file. Nothing here executes what it reads.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import safetensors
import safetensors.numpy

from promoe.config import ModelConfig, RectifiedFlow

if TYPE_CHECKING:
    from promoe.model import Model

__all__ = ["CheckpointError", "load", "save"]

VERSION = 1  # newer ones are refused; a new layout raises it, and still reads the old
MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"
CHUNK = 1 << 22  # bytes hashed or written at a time
_FILES = {  # file: prefixes of the training state in it; a single one is left out of names
    "parameters.safetensors": ("param.",),
    "ema.safetensors": ("ema.",),
    "optimizer.safetensors": ("exp_avg.", "exp_avg_sq."),
}


class CheckpointError(ValueError):
    """A file or folder that is not a whole checkpoint of promoe, or not of this run."""


# ---------------------------------------------------------------- files


def write_tensors(path, tensors, metadata=None):
    """Write a safetensors file and flush it to the disk.

    The library's own writer needs a second copy of all tensors, and reports a full disk as an
    error of its own kind. This one streams, hashes as it goes and raises OSError.

    Parameters
    ----------
    path : path
    tensors : dict of float32 arrays
    metadata : dict of str, optional

    Returns
    -------
    dict
        ``bytes`` and ``sha256`` of the file.
    """
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape),
                        "data_offsets": [end, end + 4 * tensor.size]}
        end += 4 * tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    digest, size = hashlib.sha256(), 0
    with open(path, "wb", buffering=0) as file:
        for piece in _pieces(struct.pack("<Q", len(text)) + text, tensors.values()):
            digest.update(piece)
            size += len(piece)
            while len(piece):  # an unbuffered write may be partial
                piece = piece[file.write(piece):]
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _pieces(head, tensors):
    """The bytes of a safetensors file, in pieces of at most CHUNK."""
    yield memoryview(head)
    for tensor in tensors:
        if tensor.size:
            data = memoryview(np.ascontiguousarray(tensor, "<f4").reshape(-1)).cast("B")
            for start in range(0, len(data), CHUNK):
                yield data[start:start + CHUNK]


def read_tensors(path):
    """The tensors and metadata of a safetensors file; CheckpointError when it is not one."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is damaged, or no safetensors file: {error}") from error


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def _write_text(path, text):
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path):
    """Flush the names in a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _saving(path):
    """Say what was being saved when the system refuses, and that nothing else is lost."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"cannot save {path}: {error.strerror}; what was saved before "
                                   f"is intact") from error


# ---------------------------------------------------------------- manifest


def describe(model):
    """What every manifest says about a model."""
    from promoe import __version__, backend_info

    return {
        "promoe": __version__, "config": model.config.to_dict(),
        "objective": getattr(model, "objective", RectifiedFlow()).to_dict(),
        "updates": int(model.step), "seed": int(model.seed),
        "rng": {"generator": "Philox4x32-10", "key": int(model.seed)},
        "device": str(model.device), "level": getattr(model, "level", backend_info()["level"]),
        "compute": getattr(model, "compute", "fp32"),
    }


def _checksum(manifest):
    plain = {k: v for k, v in manifest.items() if k != "checksum"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _check_manifest(manifest, kind, where):
    if not isinstance(manifest, dict) or manifest.get("format") != f"promoe-{kind}":
        raise CheckpointError(f"{where} is not a {kind} of promoe")
    if not isinstance(manifest.get("version"), int) or manifest["version"] > VERSION:
        raise CheckpointError(f"{where} has format version {manifest.get('version')}, this promoe "
                              f"reads up to {VERSION}: it was written by a newer one")
    if manifest.get("checksum") != _checksum(manifest):
        raise CheckpointError(f"{where} is damaged: its manifest does not match its checksum")
    return manifest


def read_manifest(path):
    """The manifest of a checkpoint directory, checked against itself."""
    file = Path(path) / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a checkpoint: it has no {MANIFEST}") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {MANIFEST}: {error}") from error
    return _check_manifest(manifest, "checkpoint", path)


# ---------------------------------------------------------------- checkpoint directories


def write_checkpoint(path, state, manifest):
    """Write a checkpoint directory, all or nothing.

    Parameters
    ----------
    path : path
        Must not be a valid checkpoint already; a damaged one is replaced.
    state : dict of arrays
        ``Model.training_state()``.
    manifest : dict
        JSON types; format, version, files and checksums are added.

    Raises
    ------
    OSError
        When the system refuses (a full disk); nothing of the attempt is left behind.
    """
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")
    with _saving(path):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            files = {name: write_tensors(temporary / name, _select(state, prefixes))
                     for name, prefixes in _FILES.items()}
            manifest = {"format": "promoe-checkpoint", "version": VERSION, **manifest,
                        "files": files}
            manifest["checksum"] = _checksum(manifest)
            _write_text(temporary / MANIFEST, json.dumps(manifest, indent=1) + "\n")
            sync_directory(temporary)
            remove_checkpoint(path)
            os.rename(temporary, path)
            sync_directory(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _select(state, prefixes):
    strip = len(prefixes[0]) if len(prefixes) == 1 else 0
    return {name[strip:]: array for name, array in state.items() if name.startswith(prefixes)}


def read_checkpoint(path):
    """Manifest and training state of a checkpoint directory.

    Raises
    ------
    CheckpointError
        When anything is missing or differs from its checksum, naming it.
    """
    path = Path(path)
    manifest = read_manifest(path)
    state = {}
    for name, prefixes in _FILES.items():
        file, wanted = path / name, manifest["files"].get(name, {})
        if not file.is_file():
            raise CheckpointError(f"{path} is damaged: {name} is missing")
        if file.stat().st_size != wanted.get("bytes"):
            raise CheckpointError(f"{path} is damaged: {name} has {file.stat().st_size} bytes "
                                  f"instead of {wanted.get('bytes')}")
        if _sha256(file) != wanted.get("sha256"):
            raise CheckpointError(f"{path} is damaged: {name} does not match its checksum")
        prefix = prefixes[0] if len(prefixes) == 1 else ""
        state.update({prefix + k: v for k, v in read_tensors(file)[0].items()})
    return manifest, state


def remove_checkpoint(path):
    """Remove a checkpoint directory; its name goes first, so that half of it is never seen."""
    path = Path(path)
    if path.exists():
        aside = path.with_name(f"{TEMPORARY}{path.name}-old-{os.getpid()}")
        os.rename(path, aside)
        shutil.rmtree(aside, ignore_errors=True)


def checkpoints(folder):
    """Checkpoint directories of a training folder, newest first; whole or not."""
    found = (Path(folder) / "checkpoints").glob("step_*")
    return sorted((p for p in found if p.is_dir() and p.name[5:].isdigit()),
                  key=lambda p: int(p.name[5:]), reverse=True)


def newest_checkpoint(folder, damaged):
    """The newest whole checkpoint of a training folder.

    Parameters
    ----------
    folder : path
    damaged : callable
        Called with the CheckpointError of each newer one that is not whole.

    Returns
    -------
    (path, manifest, state) or None
    """
    for path in checkpoints(folder):
        try:
            return path, *read_checkpoint(path)
        except CheckpointError as error:
            damaged(error)
    return None


# ---------------------------------------------------------------- one model in one file


def save(model: Model, path: str | os.PathLike, optimizer: bool = False) -> None:
    """Save a model as one safetensors file: parameters and EMA under their official names.

    Parameters
    ----------
    model : Model
    path : path
        Replaced at once when the file is complete.
    optimizer : bool
        Keep the moments of AdamW too (twice the size), to continue training.
    """
    path = _path("save", path)
    if not hasattr(model, "training_state"):
        raise TypeError(f"save: model must be a Model, not {type(model).__name__}")
    if path.is_dir():
        raise IsADirectoryError(f"save: {path} is a directory; give the name of a file, such as "
                                f"{path / 'model.safetensors'}")
    prefixes = ("param.", "ema.", *(("exp_avg.", "exp_avg_sq.") if optimizer else ()))
    state = _select(model.training_state(), prefixes)
    tensors = {name.removeprefix("param."): array for name, array in state.items()}
    manifest = {"format": "promoe-model", "version": VERSION, **describe(model),
                "tensors": _digest(tensors)}
    manifest["checksum"] = _checksum(manifest)
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")
    with _saving(path):
        try:
            write_tensors(temporary, tensors, {"promoe": json.dumps(manifest)})
            os.replace(temporary, path)
            sync_directory(path.absolute().parent)
        finally:
            temporary.unlink(missing_ok=True)


def _path(where, path):
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{where}: path must be a path, not {type(path).__name__}")
    return Path(path)


def _digest(tensors):
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}\0".encode())
        digest.update(np.ascontiguousarray(tensors[name], "<f4").data)
    return digest.hexdigest()


def _file_manifest(path):
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is damaged, or no safetensors file: {error}") from error
    try:
        manifest = json.loads(metadata["promoe"])
    except (KeyError, ValueError):
        raise CheckpointError(
            f"{path} was not written by promoe.save; for a safetensors file with official names: "
            f"promoe.Model(config).load_state_dict(safetensors.numpy.load_file(path))") from None
    return _check_manifest(manifest, "model", path)


def _read_model_file(path):
    manifest = _file_manifest(path)  # first: a foreign file may have types that NumPy has not
    tensors = read_tensors(path)[0]
    if _digest(tensors) != manifest["tensors"]:
        raise CheckpointError(f"{path} is damaged: its tensors do not match their checksum")
    prefixes = ("ema.", "exp_avg.", "exp_avg_sq.")
    state = {k if k.startswith(prefixes) else f"param.{k}": v for k, v in tensors.items()}
    return manifest, state


def load(path: str | os.PathLike, device: str = "cpu", compute: str = "fp32") -> Model:
    """Load a model.

    Parameters
    ----------
    path : path
        A file of `save`, a checkpoint directory, or a training folder (its newest whole
        checkpoint).
    device, compute : str
        As of `Model`.

    Returns
    -------
    Model
        With parameters, EMA, step and, where the file has them, moments.

    Raises
    ------
    CheckpointError
        When it is damaged or not of promoe.
    FileNotFoundError
    """
    path = _path("load", path)
    if path.is_file():
        if path.suffix in (".pth", ".pt", ".ckpt", ".bin"):
            raise CheckpointError(f"{path}: PyTorch pickles are not read yet; give a file of "
                                  f"promoe.save, a checkpoint or a training folder")
        manifest, state = _read_model_file(path)
    elif (path / MANIFEST).is_file():
        manifest, state = read_checkpoint(path)
    elif path.is_dir():
        errors = []
        found = newest_checkpoint(path, errors.append)
        if found is None:
            raise errors[0] if errors else CheckpointError(f"{path} has no checkpoint")
        for error in errors:
            warn_damaged(error)
        manifest, state = found[1:]
    else:
        raise FileNotFoundError(f"load: {path}: no such file or folder")
    return restore(manifest, state, path, device, compute)


def peek(path):
    """The manifest of what `load` would load, without reading the tensors."""
    path = Path(path)
    if path.is_file():
        return _file_manifest(path)
    if (path / MANIFEST).is_file():
        return read_manifest(path)
    errors = []
    for found in checkpoints(path):
        try:
            return read_manifest(found)
        except CheckpointError as error:
            errors.append(error)
    raise errors[0] if errors else CheckpointError(f"{path} has no checkpoint")


def warn_damaged(error):
    """Say that a checkpoint was passed over."""
    import warnings

    warnings.warn(f"{error}; an earlier one is used", RuntimeWarning, stacklevel=3)


@contextmanager
def _fitting(where):
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where} does not fit this version of promoe: {error}") from error


def restore(manifest, state, where, device="cpu", compute="fp32", model=None):
    """A Model with the given state (a new one, or `model`)."""
    from promoe import Model

    with _fitting(where):
        config, seed = ModelConfig.from_dict(manifest["config"]), manifest["seed"]
        objective = RectifiedFlow.from_dict(manifest["objective"])
    if model is None:  # outside: a device that is not there is no fault of the file
        model = Model(config, seed=seed, device=device, compute=compute, objective=objective)
    with _fitting(where):
        model.load_training_state(state, manifest["updates"])
    return model
