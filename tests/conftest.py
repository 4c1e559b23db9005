"""Options of the suite.

PROMOE_TEST_DEVICE=cuda-on-cpu (or cuda) runs the tests of the ops there, where they say no device.
"""

import os

import pytest

from promoe import _core


def pytest_configure(config):
    device = os.environ.get("PROMOE_TEST_DEVICE", "cpu")
    if device == "cuda-on-cpu" and "PROMOE_CUDA_ON_CPU" not in os.environ:
        from tests.cuda.host import build
        os.environ["PROMOE_CUDA_ON_CPU"] = str(build.plugin())
    _core._ops_device(device, "fp32")


def pytest_addoption(parser):
    parser.addoption("--official", metavar="PATH",
                     help="a checkout of the public PyTorch code: compare with it on random configurations (needs torch)")


@pytest.fixture(scope="session")
def official_repo(request):
    path = request.config.getoption("--official")
    if not path:
        pytest.skip("needs --official PATH and torch")
    return path
