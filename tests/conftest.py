"""Options of the suite."""

import pytest


def pytest_addoption(parser):
    parser.addoption("--official", metavar="PATH",
                     help="a checkout of the public PyTorch code: compare with it on random configurations (needs torch)")


@pytest.fixture(scope="session")
def official_repo(request):
    path = request.config.getoption("--official")
    if not path:
        pytest.skip("needs --official PATH and torch")
    return path
