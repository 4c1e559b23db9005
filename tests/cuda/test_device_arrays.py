"""promoe.ops on arrays that lie on the device already: nothing is copied, and whatever is wrong is said."""

import gc
import re
from pathlib import Path

import numpy as np
import pytest

from promoe import DeviceArray, ops
from tests.cuda.common import DEVICE, on_the_stand_in, stand_in
from tests.ops.common import make, make_upstream, oracle

ROOT = Path(__file__).parents[2]


class Interface:
    """What CuPy or Numba show: the memory of a DeviceArray, and changes to what is said of it."""

    def __init__(self, array, **changes):
        self.array = array
        self.__cuda_array_interface__ = {**array.__cuda_array_interface__, **changes}


class Pack:
    """What PyTorch shows: DLPack alone."""

    def __init__(self, array, device=None):
        self.array, self.device, self.streams = array, device or array.__dlpack_device__(), []

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, stream=None):
        self.streams.append(stream)
        return self.array.__dlpack__(stream=stream)


def on_device(array, compute="fp32", act=False):
    dtype = "bfloat16" if act and compute == "bf16" else None
    return DeviceArray(array, DEVICE, dtype)


def acts(op):
    """Names of the arguments and gradients that are activations: to NumPy they are float32, as all others."""
    names = set(re.findall(r"X\(\w+,\s*(\w+),\s*act,", (ROOT / f"csrc/ops/{op}.h").read_text()))
    return names | {"d" + name for name in names}


def equal(a, b):
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("wrap", [lambda a: a, Pack, "interface"], ids=["DeviceArray", "DLPack", "interface"])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("op", ["linear", "silu", "label_embedding", "patch_embed", "mse_loss", "unpatchify"])
def test_the_same_bits_as_from_numpy(op, compute, wrap):
    case = list(oracle(op).CASES)[0]
    inputs, names = make(op, case), acts(op)
    where = {"device": DEVICE, "compute": compute}

    def given(name, value):
        if not isinstance(value, np.ndarray):
            return value
        array = on_device(value, compute, name in names)
        if wrap == "interface":
            return Interface(array) if array.dtype != "bfloat16" else Pack(array)
        return wrap(array)

    def both(which, arguments, fresh):
        host = getattr(ops, f"{op}_{which}")(**arguments, **where)
        device = getattr(ops, f"{op}_{which}")(**{k: given(k, v) for k, v in arguments.items()}, **where)
        assert host.keys() == device.keys()
        for name, value in host.items():
            assert isinstance(device[name], DeviceArray) and device[name].shape == value.shape
            assert device[name].dtype == ("bfloat16" if compute == "bf16" and name in names else str(value.dtype))
            assert equal(device[name].numpy(), value), name
        return host

    outs = both("forward", inputs, True)
    both("backward", {**inputs, **outs, **make_upstream(op, case, outs)}, True)


def test_what_is_given_is_written_in_place():
    x = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    out = DeviceArray(np.zeros((5, 7), np.float32), DEVICE)
    made = ops.silu_forward(DeviceArray(x, DEVICE), y=out, device=DEVICE)
    assert made["y"] is out and equal(out.numpy(), ops.silu_forward(x, device=DEVICE)["y"])
    # NumPy and device arrays may be mixed: what is NumPy's is copied, what is made is on the device
    weight = np.random.default_rng(1).standard_normal((3, 7)).astype(np.float32)
    mixed = ops.linear_forward(DeviceArray(x, DEVICE), weight, device=DEVICE)["y"]
    assert isinstance(mixed, DeviceArray)
    assert equal(mixed.numpy(), ops.linear_forward(x, weight, device=DEVICE)["y"])
    host = np.zeros((5, 3), np.float32)
    assert ops.linear_forward(DeviceArray(x, DEVICE), weight, y=host, device=DEVICE)["y"] is host
    assert equal(host, mixed.numpy())


def test_dlpack_is_asked_for_the_default_stream():
    pack = Pack(DeviceArray(np.ones((2, 2), np.float32), DEVICE))
    ops.silu_forward(pack, device=DEVICE)
    assert pack.streams == [1]


def test_an_exported_array_outlives_its_owner():
    array = DeviceArray(np.arange(6, dtype=np.float32).reshape(2, 3), DEVICE)
    capsule = array.__dlpack__()
    pack = Pack(array)
    pack.__dlpack__ = None
    del array
    gc.collect()

    class Held:
        def __dlpack_device__(self):
            return 2, 0

        def __dlpack__(self, stream=None):
            return capsule

    y = ops.silu_forward(Held(), device=DEVICE)["y"].numpy()
    assert equal(y, ops.silu_forward(np.arange(6, dtype=np.float32).reshape(2, 3), device=DEVICE)["y"])


def test_empty_arrays():
    y = ops.silu_forward(DeviceArray(np.zeros((0, 4), np.float32), DEVICE), device=DEVICE)["y"]
    assert y.shape == (0, 4) and y.numpy().shape == (0, 4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.int64])
def test_a_device_array_comes_back_as_it_was(dtype):
    value = (100 * np.random.default_rng(2).standard_normal((3, 1, 5))).astype(dtype)
    array = DeviceArray(value, DEVICE)
    assert array.shape == (3, 1, 5) and array.dtype == np.dtype(dtype).name and "(3, 1, 5)" in repr(array)
    assert equal(array.numpy(), value)
    shown = array.__cuda_array_interface__
    assert shown["shape"] == (3, 1, 5) and np.dtype(shown["typestr"]) == dtype and shown["version"] == 3


def test_bfloat16_is_rounded_to_nearest_even():
    value = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-16, -0.0, np.inf, np.nan], np.float32)
    array = DeviceArray(value, DEVICE, "bfloat16")
    got = array.numpy()
    assert got[:6].tolist() == [1, 1, 1 + 2**-6, 1 + 2**-7, 0, np.inf] and np.isnan(got[6])
    assert not hasattr(array, "__cuda_array_interface__")


F32 = np.ones((2, 3), np.float32)


@pytest.mark.parametrize("make_x, error, words", [
    (lambda: DeviceArray(F32.astype(np.float64), DEVICE), TypeError, "silu_forward: x must be float32; got float64"),
    (lambda: DeviceArray(F32, DEVICE, "bfloat16"), TypeError, "x must be float32; got bfloat16"),
    (lambda: DeviceArray(F32[0], DEVICE), ValueError, "x must have 2 axes; got 1"),
    (lambda: Interface(DeviceArray(F32, DEVICE), strides=(4, 8)), ValueError, "x must be C-contiguous"),
    (lambda: Interface(DeviceArray(F32, DEVICE), mask=object()), ValueError, "x has a mask"),
    (lambda: Interface(DeviceArray(F32, DEVICE), typestr="<f2"), TypeError, "x must be float32; got <f2"),
    (lambda: Interface(DeviceArray(F32, DEVICE), typestr=">f4"), TypeError, "x must be float32; got >f4"),
    (lambda: Interface(DeviceArray(F32, DEVICE), shape=[2, 3]), ValueError, "not as documented"),
    (lambda: Interface(DeviceArray(F32, DEVICE), shape=(2, -3)), ValueError, "negative length"),
    (lambda: Interface(DeviceArray(F32, DEVICE), data=(F32.ctypes.data, False)), ValueError, "is not memory of a GPU"),
    (lambda: Interface(DeviceArray(F32, DEVICE), stream=0), ValueError, "wrong stream"),
    (lambda: Interface(DeviceArray(F32, DEVICE), stream=12345), RuntimeError, "the stream of the array"),
    (lambda: Pack(DeviceArray(F32, DEVICE), (1, 0)), TypeError, "in host memory"),
    (lambda: Pack(DeviceArray(F32, DEVICE), (10, 0)), ValueError, r"another kind of device \(DLPack's 10\)"),
])
def test_wrong_arrays(make_x, error, words):
    if DEVICE == "cuda" and words == "the stream of the array":
        pytest.skip("the driver does not check what is no stream")
    with pytest.raises(error, match=words):
        ops.silu_forward(make_x(), device=DEVICE)


def test_misaligned_and_read_only():
    array = DeviceArray(np.zeros(9, np.float32), DEVICE)
    at = array.__cuda_array_interface__["data"][0]
    with pytest.raises(ValueError, match="x is misaligned"):
        ops.silu_forward(Interface(array, shape=(2, 3), data=(at + 2, False)), device=DEVICE)
    with pytest.raises(ValueError, match="y is read-only"):
        ops.silu_forward(F32, y=Interface(array, shape=(2, 3), data=(at, True)), device=DEVICE)
    inside = Interface(array, shape=(2, 4), data=(at + 4, True))  # read-only is fine for what is read
    assert ops.silu_forward(inside, device=DEVICE)["y"].shape == (2, 4)


def test_overlap():
    array = DeviceArray(np.zeros(9, np.float32), DEVICE)
    at = array.__cuda_array_interface__["data"][0]
    x, y = (Interface(array, shape=(2, 3), data=(at + shift, False)) for shift in (0, 12))
    with pytest.raises(ValueError, match="y shares memory with x"):
        ops.silu_forward(x, y=y, device=DEVICE)


def test_a_device_array_where_the_host_computes():
    with pytest.raises(TypeError, match="x is in the memory of a GPU, and device is 'cpu': say device='cuda'"):
        ops.silu_forward(DeviceArray(F32, DEVICE), device="cpu")
    with pytest.raises(ValueError, match="'cpu' computes in host memory"):
        DeviceArray(F32, "cpu")


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"weight must be .* \(F, D\) = \(4, 3\), where F is 4 by weight, D is 3 by x; got .*\(4, 5\)"):
        ops.linear_forward(DeviceArray(F32, DEVICE), DeviceArray(np.ones((4, 5), np.float32), DEVICE), device=DEVICE)


@pytest.mark.parametrize("value, dtype", [(F32.T, None), (F32.astype(np.float16), None), (F32, "float64"),
                                          (F32.astype(np.float64), "bfloat16"), (F32.tolist(), None)])
def test_wrong_device_arrays(value, dtype):
    with pytest.raises(TypeError, match="DeviceArray: array must be"):
        DeviceArray(value, DEVICE, dtype)


@pytest.mark.skipif(not on_the_stand_in(), reason="by the stand-in of the runtime")
def test_out_of_device_memory():
    library = stand_in()
    library.pm_host_set(b"fail_allocation", b"1")
    with pytest.raises(MemoryError, match=r"asked for, and .* MB of .* MB are free"):
        DeviceArray(F32, DEVICE)
    x = DeviceArray(F32, DEVICE)
    library.pm_host_set(b"fail_allocation", b"1")
    with pytest.raises(MemoryError, match="are free"):
        ops.silu_forward(x, device=DEVICE)
    assert ops.silu_forward(x, device=DEVICE)["y"].shape == (2, 3)


def test_pytorch_takes_it_and_gives_it():
    torch = pytest.importorskip("torch")
    if DEVICE != "cuda":
        pytest.skip("PyTorch cannot look at memory that only says it is a GPU's")
    x = torch.randn(5, 7, device="cuda")
    y = torch.from_dlpack(ops.silu_forward(x, device=DEVICE)["y"])
    torch.testing.assert_close(y, torch.nn.functional.silu(x))
