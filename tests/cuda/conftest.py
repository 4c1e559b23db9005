"""The library of device="cuda-on-cpu" is built when the tests of this folder are collected, where they run on it."""

import os

from tests.cuda.common import on_the_stand_in
from tests.cuda.host import build

if on_the_stand_in() and "PROMOE_CUDA_ON_CPU" not in os.environ:
    os.environ["PROMOE_CUDA_ON_CPU"] = str(build.plugin())
