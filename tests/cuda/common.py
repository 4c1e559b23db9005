"""Which device the tests of this folder run on, and the settings of the stand-in for CUDA's runtime."""

import ctypes
import os

DEVICE = os.environ.get("PROMOE_TEST_DEVICE", "cuda-on-cpu")


def on_the_stand_in():
    """Whether the kernels run on the CPU."""
    return DEVICE == "cuda-on-cpu"


def stand_in():
    """The library of device="cuda-on-cpu", with pm_host_set and pm_host_launches (host/cuda_runtime.h)."""
    library = ctypes.CDLL(os.environ["PROMOE_CUDA_ON_CPU"])
    library.pm_host_launches.restype = ctypes.c_long
    return library
