"""The library of device="cuda-on-cpu" is built when the tests of this folder are collected."""

import os

from tests.cuda.host import build

if "PROMOE_CUDA_ON_CPU" not in os.environ:
    os.environ["PROMOE_CUDA_ON_CPU"] = str(build.plugin())
