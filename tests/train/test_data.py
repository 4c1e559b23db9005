"""Embedded digits, image folders, and the order of samples."""

import hashlib
import itertools

import numpy as np
import pytest

from promoe import ModelConfig, data

DIGITS = ModelConfig(input_size=8, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=10)


def image_config(channels=3, size=8):
    return DIGITS.replace(in_channels=channels, input_size=size)


# ---------------------------------------------------------------- digits


def test_digits_split():
    x, y = data.load_digits()
    hx, hy = data.load_digits("heldout")
    assert x.shape == (1501, 1, 8, 8) and hx.shape == (296, 1, 8, 8)
    assert x.dtype == np.float32 and y.dtype == np.int64
    assert x.min() == -1 and x.max() == 1
    assert (np.bincount(hy) >= 29).all()
    every, labels = data.load_digits("all")
    assert sorted(map(bytes, every)) == sorted(map(bytes, np.concatenate([x, hx])))
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_digits_never_change():
    digest = hashlib.sha256()
    for split in ("train", "heldout"):
        x, y = data.load_digits(split)
        digest.update(x.astype("<f4").tobytes() + y.astype("<i8").tobytes())
    assert digest.hexdigest() == "e58b555e0b88a8bddf3263f10bc1f0b11d6fbf6abf84cbbccb3c539b3aa7ab2e"


def test_digits_unknown_split():
    with pytest.raises(ValueError, match="did you mean 'heldout'"):
        data.load_digits("held-out")


# ---------------------------------------------------------------- order


def test_every_epoch_has_every_sample_once_in_another_order():
    order = data.Order(37, seed=5)
    first, second = order.at(0, 37)[0], order.at(37, 37)[0]
    assert sorted(first) == sorted(second) == list(range(37))
    assert first.tolist() != second.tolist()
    assert data.Order(37, seed=6).at(0, 37)[0].tolist() != first.tolist()


def test_order_is_a_function_of_the_position():
    whole, flips = data.Order(37, seed=5).at(0, 200)
    for start, size in itertools.product((0, 1, 36, 37, 100), (1, 36, 37, 38, 99)):
        indices, mirror = data.Order(37, seed=5).at(start, size)
        assert indices.tolist() == whole[start:start + size].tolist()
        assert mirror.tolist() == flips[start:start + size].tolist()
    assert 60 < flips.sum() < 140


def test_order_known_answer():
    assert data.Order(10, seed=0).at(0, 10)[0].tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]


def test_batches_continue_anywhere():
    x = np.arange(24, dtype=np.float32).reshape(12, 1, 1, 2)
    source = data.ArrayData(x, np.arange(12) % 3)
    stream = data.batches(source, 1, 0, 5, flip=True)
    run = [next(stream) for _ in range(6)]
    stream.close()
    again = data.batches(source, 1, 15, 5, flip=True)
    for x0, y0 in run[3:]:
        x1, y1 = next(again)
        assert np.array_equal(x0, x1) and np.array_equal(y0, y1)
        assert x1.flags.c_contiguous and x1.dtype == np.float32
    again.close()
    seen = np.concatenate([b[0] for b in run])[:12]
    assert sorted(seen.min(axis=(1, 2, 3)).tolist()) == list(range(0, 24, 2))
    assert (seen[..., 0] > seen[..., 1]).any() and (seen[..., 0] < seen[..., 1]).any()


# ---------------------------------------------------------------- arrays


@pytest.mark.parametrize("x, y, message", [
    (np.zeros((2, 3)), np.zeros(2, int), "x must be"),
    (np.zeros((2, 1, 2, 2), complex), np.zeros(2, int), "x must be"),
    (np.zeros((2, 1, 2, 2)), np.zeros(3, int), "y must be 2 integers"),
    (np.zeros((2, 1, 2, 2)), np.zeros(2), "y must be 2 integers"),
    (np.zeros((0, 1, 2, 2)), np.zeros(0, int), "no samples"),
    (np.full((2, 1, 2, 2), np.nan), np.zeros(2, int), "sample 0.*not finite"),
    (np.zeros((2, 1, 2, 2)), np.array([0, -1]), "label -1 of sample 1"),
])
def test_bad_arrays(x, y, message):
    with pytest.raises(ValueError, match=message):
        data.ArrayData(x, y)


def test_open_data_checks_the_model():
    assert len(data.open_data("digits", DIGITS)) == 1501
    with pytest.raises(ValueError, match=r"\(1, 8, 8\).*takes \(3, 8, 8\): set in_channels = 1"):
        data.open_data("digits", image_config())
    with pytest.raises(ValueError, match="10 classes.*num_classes = 5"):
        data.open_data("digits", DIGITS.replace(num_classes=5))
    with pytest.raises(FileNotFoundError, match="digitz"):
        data.open_data("digitz", DIGITS)
    with pytest.raises(TypeError, match="not int"):
        data.open_data(3, DIGITS)


# ---------------------------------------------------------------- image folders


@pytest.fixture
def folder(tmp_path):
    """Two classes; every image is one colour, so that any crop of it is known."""
    Image = pytest.importorskip("PIL.Image")
    for name, colour, count in (("b", (255, 0, 0), 3), ("a", (0, 0, 255), 2)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("RGB", (20 + i, 33), colour).save(tmp_path / name / f"{i}.png")
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden").mkdir()
    return tmp_path


def test_image_folder(folder):
    source = data.open_data(folder, image_config())
    assert source.classes == ("a", "b") and len(source) == 5
    x, y = source.read([0, 4])
    assert x.shape == (2, 3, 8, 8) and x.dtype == np.float32 and y.tolist() == [0, 1]
    assert (x[0, 2] == 1).all() and (x[0, :2] == -1).all() and (x[1, 0] == 1).all()
    grey, _ = data.open_data(str(folder), image_config(1)).read([0])
    assert grey.shape == (1, 1, 8, 8) and np.ptp(grey) == 0


def test_centre_crop_keeps_the_centre(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    pixels = np.zeros((16, 48), np.uint8)
    pixels[:, 16:32] = np.arange(16)[None] * 16
    image = data.centre_crop(Image.fromarray(pixels), 16, 16, Image)
    assert np.array_equal(np.asarray(image), pixels[:, 16:32])
    halved = data.centre_crop(Image.fromarray(pixels), 8, 8, Image)
    expected = pixels[:, 16:32].reshape(8, 2, 8, 2).mean(axis=(1, 3))
    assert np.abs(np.asarray(halved, float) - expected).max() <= 1
    wide = data.centre_crop(Image.fromarray(pixels), 5, 17, Image)
    assert wide.size == (17, 5)


def test_sixteen_bits(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    (tmp_path / "a").mkdir()
    deep = (np.arange(64).reshape(8, 8) * 1000).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "a" / "0.png")
    Image.fromarray(deep.astype(np.float32)).save(tmp_path / "a" / "1.tif")
    for channels in (1, 3):
        source = data.ImageFolder(tmp_path, (channels, 8, 8))
        x, _ = source.read([0])
        assert np.array_equal(x[0, 0], (deep >> 8) / np.float32(127.5) - 1)
        with pytest.raises(ValueError, match=r"a/1\.tif cannot be read.*mode F"):
            source.read([1])


def test_damaged_images_are_named(folder):
    (folder / "a" / "1.png").write_bytes(b"\x89PNG broken")
    source = data.open_data(folder, image_config())
    with pytest.raises(ValueError, match=r"a/1\.png cannot be read"):
        source.read([1])
    whole = (folder / "b" / "0.png").read_bytes()
    (folder / "b" / "0.png").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match=r"b/0\.png cannot be read"):
        source.read([2])
    with pytest.raises(ValueError, match=r"/[01]\.png cannot be read"):  # from the reading thread
        for _ in zip(range(3), data.batches(source, 0, 0, 4)):
            pass


def test_bad_folders(tmp_path):
    pytest.importorskip("PIL.Image")
    with pytest.raises(ValueError, match="has no directories"):
        data.open_data(tmp_path, image_config())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no images"):
        data.open_data(tmp_path, image_config())
    with pytest.raises(ValueError, match="1 .grey. or 3 .RGB. channels"):
        data.open_data(tmp_path, image_config(4))


def test_missing_pillow_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(ImportError, match=r"promoe\[data\]"):
        data.open_data(folder, image_config())


def test_description_tells_data_apart(folder):
    first = data.open_data(folder, image_config()).describe()
    assert first == data.open_data(folder, image_config()).describe()
    (folder / "b" / "2.png").unlink()
    assert first != data.open_data(folder, image_config()).describe()
