"""Data: embedded digits, image folders, arrays; and the order in which training sees them.

A data set is anything with ``shape`` (C, *sizes), ``classes`` (names), ``len()`` and
``read(indices) -> (x, y)``; ``open_data`` makes one. What sample comes at a position of a run is a
pure function of (seed, position): nothing to save, and a resumed run continues with the very next
sample.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from promoe.config import nearest

__all__ = ["ArrayData", "ImageFolder", "Order", "batches", "load_digits", "open_data"]

DIGITS = Path(__file__).with_name("data") / "digits.npz"
IMAGE_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif",
                            ".tiff", ".webp"))


# ---------------------------------------------------------------- embedded digits


def load_digits(split: str = "train") -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The UCI handwritten digits: 8 x 8 pixels, 10 classes, CC BY 4.0 (see data/README.md).

    Parameters
    ----------
    split : {"train", "heldout", "all"}
        Of each class, in file order, every sixth image is held out: 1,501 images train,
        296 are held out. Fixed for good.

    Returns
    -------
    x : float32 array (n, 1, 8, 8)
        In [-1, 1]; -1 is background.
    y : int64 array (n,)
    """
    if split not in ("train", "heldout", "all"):
        raise ValueError(f"load_digits: split = {split!r}: must be 'train', 'heldout' or 'all'"
                         f"{nearest(split, ('train', 'heldout', 'all'))}")
    with np.load(DIGITS) as file:
        images, labels = file["images"], file["labels"].astype(np.int64)
    rank = np.empty(len(labels), np.int64)  # place of an image among those of its class
    for digit in range(10):
        members = labels == digit
        rank[members] = np.arange(members.sum())
    heldout = rank % 6 == 5
    keep = {"train": ~heldout, "heldout": heldout, "all": slice(None)}[split]
    x = images[keep, None].astype(np.float32) / np.float32(8) - np.float32(1)
    return x, labels[keep]


# ---------------------------------------------------------------- data sets


class ArrayData:
    """Samples in memory.

    Parameters
    ----------
    x : array (n, C, *sizes)
        Made float32; every value must be finite.
    y : integer array (n,)
        Labels 0..Y-1.
    classes : sequence of str, optional
        Names of the classes; their numbers when absent.
    name : str
        What the manifest calls it.
    """

    def __init__(self, x, y, classes=None, name="arrays"):
        x, y = np.asarray(x), np.asarray(y)
        if x.dtype.kind not in "fiu" or x.ndim < 3:
            raise ValueError(f"data: x must be numbers of shape (n, C, *sizes), "
                             f"not {x.dtype} {x.shape}")
        if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
            raise ValueError(f"data: y must be {len(x)} integers, one per sample, "
                             f"not {y.dtype} {y.shape}")
        if len(x) == 0:
            raise ValueError("data: there are no samples")
        x = np.ascontiguousarray(x, np.float32)
        finite = np.isfinite(x.reshape(len(x), -1)).all(axis=1)
        if not finite.all():
            raise ValueError(f"data: sample {int(np.argmin(finite))} has a value that is not "
                             f"finite in float32")
        if y.min() < 0:
            raise ValueError(f"data: label {y.min()} of sample {int(y.argmin())} is negative")
        self.x, self.y, self.name = x, y.astype(np.int64), name
        self.classes = tuple(classes or map(str, range(int(y.max()) + 1)))
        if y.max() >= len(self.classes):
            raise ValueError(f"data: label {y.max()} of sample {int(y.argmax())} has no class "
                             f"name: there are {len(self.classes)}")

    def __len__(self):
        return len(self.x)

    @property
    def shape(self):
        """Shape of one sample: (C, *sizes)."""
        return self.x.shape[1:]

    def read(self, indices):
        """Samples `indices`: float32 (n, C, *sizes) and int64 labels (n,)."""
        return self.x[indices], self.y[indices]

    def describe(self):
        """What a manifest records, to tell other data from this."""
        digest = hashlib.sha256(self.x.tobytes() + self.y.tobytes()).hexdigest()
        return {"name": self.name, "samples": len(self), "sha256": digest}


class ImageFolder:
    """Images in one directory per class; classes are the sorted directory names.

    Images are decoded when they are needed, cropped to the centre as in ADM (halved with a box
    filter while more than twice too large, bicubic to the short side, centre crop) and scaled to
    [-1, 1]. Needs the extra `data` (Pillow).

    Parameters
    ----------
    root : path
    shape : tuple (C, height, width)
        C is 3 (RGB) or 1 (grey).
    """

    def __init__(self, root, shape):
        self.root, self.shape, self.name = Path(root), tuple(shape), "folder"
        if len(self.shape) != 3 or self.shape[0] not in (1, 3):
            raise ValueError(f"image folder: samples of shape {self.shape} (C, *sizes): images "
                             f"have two axes and 1 (grey) or 3 (RGB) channels; set in_channels "
                             f"and input_size")
        self._image = import_pillow()
        if not self.root.is_dir():
            raise FileNotFoundError(f"image folder: {self.root}: no such directory")
        folders = sorted(f.name for f in os.scandir(self.root)
                         if f.is_dir() and not f.name.startswith("."))
        if not folders:
            raise ValueError(f"image folder: {self.root} has no directories: one per class is "
                             f"expected, with its images inside")
        self.classes = tuple(folders)
        self.paths, labels = [], []
        for label, folder in enumerate(folders):
            images = sorted(p for p in (self.root / folder).rglob("*")
                            if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
            if not images:
                raise ValueError(f"image folder: {self.root / folder} has no images "
                                 f"({', '.join(sorted(IMAGE_SUFFIXES))})")
            self.paths += images
            labels += [label] * len(images)
        self.y = np.array(labels, np.int64)

    def __len__(self):
        return len(self.paths)

    def read(self, indices):
        """Samples `indices`: float32 (n, C, height, width) and int64 labels (n,)."""
        x = np.stack([self._decode(self.paths[i]) for i in indices])
        return x, self.y[indices]

    def _decode(self, path):
        channels, height, width = self.shape
        try:
            with self._image.open(path) as image:
                image = eight_bits(image, self._image).convert("RGB" if channels == 3 else "L")
            image = centre_crop(image, height, width, self._image)
        except (OSError, SyntaxError, ValueError, EOFError,
                self._image.DecompressionBombError) as error:
            raise ValueError(f"image folder: {path} cannot be read: {error}") from error
        pixels = np.asarray(image, np.float32).reshape(height, width, channels)
        return pixels.transpose(2, 0, 1) / np.float32(127.5) - np.float32(1)

    def describe(self):
        """What a manifest records: names and sizes of the files, not their contents."""
        digest = hashlib.sha256()
        for path in self.paths:
            entry = f"{path.relative_to(self.root).as_posix()}\0{path.stat().st_size}\n"
            digest.update(entry.encode("utf-8", "surrogateescape"))
        return {"name": self.name, "samples": len(self), "sha256": digest.hexdigest()}


def import_pillow():
    """PIL.Image, or an ImportError that says how to get it."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("image folders need Pillow: pip install 'promoe[data]'") from error
    return Image


def eight_bits(image, Image):
    """A grey image of 16 bits in 8; others as they are. Pillow's own conversion would clip it."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of Pillow's mode {image.mode} have no fixed range; 8 or 16 bits "
                         f"are expected")
    return image


def centre_crop(image, height, width, Image):
    """The centre of `image`, resized so that `height` x `width` is the largest box inside it."""
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return image.crop((left, top, left + width, top + height))


def open_data(data, config):
    """The data set that `data` names, checked against the model.

    Parameters
    ----------
    data : "digits", path of an image folder, (x, y) arrays, or a data set
    config : ModelConfig

    Raises
    ------
    ValueError
        When samples or classes do not fit the model.
    """
    if isinstance(data, str) and data == "digits":
        opened = ArrayData(*load_digits("train"), name="digits")
    elif isinstance(data, (str, os.PathLike)):
        if not Path(data).is_dir():
            raise FileNotFoundError(f"data: {data}: no such folder; give 'digits' or a folder of "
                                    f"images, one directory per class")
        opened = ImageFolder(data, config.input_shape)
    elif isinstance(data, tuple) and len(data) == 2:
        opened = ArrayData(*data)
    elif hasattr(data, "read") and hasattr(data, "shape"):
        opened = data
    else:
        raise TypeError(f"data: 'digits', a folder, (x, y) arrays or a data set is expected, "
                        f"not {type(data).__name__}")
    if tuple(opened.shape) != config.input_shape:
        raise ValueError(f"data: samples of {opened.name} are {tuple(opened.shape)} (C, *sizes), "
                         f"the model takes {config.input_shape}: set in_channels = "
                         f"{opened.shape[0]} and input_size = {tuple(opened.shape[1:])}")
    if len(opened.classes) > config.num_classes:
        raise ValueError(f"data: {opened.name} has {len(opened.classes)} classes, the model "
                         f"num_classes = {config.num_classes}")
    return opened


# ---------------------------------------------------------------- order


class Order:
    """Which sample comes at which position of a run, and which ones are mirrored.

    Every epoch has its own permutation, sorted out of counter-based draws (Philox4x64-10 keyed by
    (seed, epoch), whose raw output NumPy guarantees for good).

    Parameters
    ----------
    samples : int
        Samples of the data set.
    seed : int
    """

    def __init__(self, samples, seed):
        self.samples, self.seed = samples, seed
        self._epoch, self._permutation, self._flips = -1, None, None

    def _load(self, epoch):
        if epoch != self._epoch:
            draws = np.random.Philox(key=[self.seed, epoch]).random_raw(2 * self.samples)
            self._permutation = np.argsort(draws[:self.samples], kind="stable")
            self._flips = draws[self.samples:] >> np.uint64(63) == 1
            self._epoch = epoch

    def at(self, position, size):
        """Indices and mirror flags of the `size` samples from global `position` on."""
        indices, flips = np.empty(size, np.int64), np.empty(size, bool)
        done = 0
        while done < size:
            epoch, start = divmod(position + done, self.samples)
            self._load(epoch)
            n = min(size - done, self.samples - start)
            indices[done:done + n] = self._permutation[start:start + n]
            flips[done:done + n] = self._flips[start:start + n]
            done += n
        return indices, flips


def batches(data, seed, position, size, flip=False):
    """Yield (x, y) from `position` on, without end; the next batch is read ahead in a thread.

    Parameters
    ----------
    data : data set
    seed : int
    position : int
        Global index of the first sample.
    size : int
        Samples per batch.
    flip : bool
        Mirror half of the samples along the last axis.
    """
    order = Order(len(data), seed)

    def read(start):
        indices, mirror = order.at(start, size)
        x, y = data.read(indices)
        if flip:
            x = np.where(mirror.reshape(-1, *[1] * (x.ndim - 1)), x[..., ::-1], x)
        return np.ascontiguousarray(x, np.float32), y

    with ThreadPoolExecutor(1, thread_name_prefix="promoe-data") as reader:
        ahead = reader.submit(read, position)
        while True:
            batch = ahead.result()
            position += size
            ahead = reader.submit(read, position)
            yield batch
