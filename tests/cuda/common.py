"""Which device the tests of this folder run on, and the settings of the stand-in for CUDA's runtime."""

import ctypes
import os

import numpy as np

DEVICE = os.environ.get("PROMOE_TEST_DEVICE", "cuda-on-cpu")


def on_the_stand_in():
    """Whether the kernels run on the CPU."""
    return DEVICE == "cuda-on-cpu"


def stand_in():
    """The library of device="cuda-on-cpu", with pm_host_set and pm_host_launches (host/cuda_runtime.h)."""
    library = ctypes.CDLL(os.environ["PROMOE_CUDA_ON_CPU"])
    library.pm_host_launches.restype = ctypes.c_long
    return library


# ---------------------------------------------------------------- a backend by itself


class Weight(ctypes.Structure):
    _fields_ = [("w", ctypes.c_void_p), ("derived", ctypes.c_void_p)]


class Op(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("fields", ctypes.c_char_p), ("args", ctypes.c_size_t),
                ("grads", ctypes.c_size_t)]


class Plugin(ctypes.Structure):
    """pm_plugin"""
    _fields_ = [*((name, ctypes.c_size_t) for name in ("version", "context", "backend", "act_bytes_at", "first_op_at",
                                                       "count")),
                ("ops", ctypes.POINTER(Op)),
                ("open", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t))]


class Backend:
    """An op of the bf16 backend, without the extension between: it alone knows where the twins of a model are."""

    MEMORY = ("alloc free write read copy zero sync begin_capture end_capture launch free_graph adopt "
              "derived_bytes derive").split()
    RESULT = {"alloc": ctypes.c_void_p, "derived_bytes": ctypes.c_size_t, "workspace": ctypes.c_size_t}

    def __init__(self, op):
        self.op, library = op, stand_in()
        library.pm_plugin_entry.restype = ctypes.POINTER(Plugin)
        self.plugin = library.pm_plugin_entry()[0]
        message = ctypes.create_string_buffer(512)
        self.table = self.plugin.open(1, message, 512)  # PM_BF16
        assert self.table, message.value
        self.context = ctypes.create_string_buffer(self.plugin.context)
        ctypes.c_void_p.from_buffer(self.context).value = self.table

    def __getattr__(self, name):
        if name in self.MEMORY:
            at = self.plugin.act_bytes_at + 8 * (1 + self.MEMORY.index(name))
        else:
            op = next(i for i in range(self.plugin.count) if self.plugin.ops[i].name == self.op.encode())
            at = self.plugin.first_op_at + 24 * op + 8 * ("forward", "backward", "workspace").index(name)
        address = ctypes.c_void_p.from_address(self.table + at).value
        kind = ctypes.CFUNCTYPE(self.RESULT.get(name, ctypes.c_int))
        return lambda *arguments: kind(address)(ctypes.byref(self.context), *arguments)

    def put(self, array):
        memory = ctypes.c_void_p(self.alloc(ctypes.c_size_t(array.nbytes)))
        assert self.write(memory, array.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(array.nbytes)) == 0
        return memory

    def get(self, memory, like):
        """What the memory holds, an array like another."""
        array = np.empty_like(like)
        address = getattr(memory, "value", memory)
        assert self.read(array.ctypes.data_as(ctypes.c_void_p), ctypes.c_void_p(address), ctypes.c_size_t(array.nbytes)) == 0
        return array

    def run(self, arguments, gradients=None):
        """forward, or with gradients backward."""
        size = self.workspace(ctypes.byref(arguments), ctypes.c_bool(gradients is not None))
        scratch = ctypes.c_void_p(self.alloc(ctypes.c_size_t(size)))
        if gradients is None:
            return self.forward(ctypes.byref(arguments), scratch)
        return self.backward(ctypes.byref(arguments), ctypes.byref(gradients), scratch)
