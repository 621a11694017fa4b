"""Every test here gets its own peers; a test that fails shows what they printed and did."""

import pytest

from tests.swarm.processes import Processes


@pytest.fixture
def processes(tmp_path):
    peers = Processes(tmp_path)
    yield peers
    peers.close()


@pytest.fixture(scope="module")
def shared_processes(tmp_path_factory):
    """For tests of one file that look at the same run."""
    peers = Processes(tmp_path_factory.mktemp("shared"))
    yield peers
    peers.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        for value in item.funcargs.values():
            if isinstance(value, Processes):
                report.sections += value.report()
    return report
