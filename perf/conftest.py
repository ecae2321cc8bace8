"""Options of the suites, and the pytest parameters that a suite's cases and providers become."""

import pytest
from suite import Session

from umer1 import device


def pytest_addoption(parser):
    group = parser.getgroup("umer1 benchmarks")
    group.addoption("--sizes", choices=("auto", "tiny", "cpu", "gpu"), default="auto", help="auto: gpu where one is")
    group.addoption("--results", help="folder for the JSON records; default: perf/results")


def pytest_generate_tests(metafunc):
    suite = getattr(metafunc.module, "SUITE", None)
    if suite is None or "provider" not in metafunc.fixturenames:
        return
    sizes = metafunc.config.getoption("--sizes")
    if sizes == "auto":
        sizes = "gpu" if device.has_cuda() else "cpu"
    pairs = [(case, provider) for case in suite.cases[sizes] for provider in suite.providers]
    names = [f"{case}-{provider.name}" for case, provider in pairs]
    metafunc.parametrize(("case", "provider"), pairs, ids=names)


@pytest.fixture(scope="module")
def session(request):
    """The run of the module's suite."""
    return Session(request.module.SUITE, request.config.getoption("--results"))


@pytest.fixture
def bench(session, benchmark):
    """(case, provider): measure it, or with --benchmark-disable check it."""
    return session.check if benchmark.disabled else session.measure
