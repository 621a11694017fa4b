"""Each case of the fault matrix as a test. A few, one for each kind, are swarm tests instead."""

import pytest

from tests.faults import cases, lab_cases  # noqa: F401  # they fill CASES
from tests.faults.lab import usable
from tests.faults.play import CASES, NEEDS, run

BOUNDED = ("kill -9 while reducing", "kill -9 of p2pd", "sends NaN")


def kind(name: str) -> pytest.MarkDecorator:
    return pytest.mark.swarm if name in BOUNDED else pytest.mark.faults


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", [pytest.param(n, id=n, marks=kind(n)) for n in CASES])
def test_the_survivors_complete_the_run_and_name_the_cause(name, tmp_path):
    if name in NEEDS and (missing := usable(*NEEDS[name])):
        pytest.skip(missing)
    outcome = run(name, tmp_path, is_quick=name in BOUNDED)
    assert not outcome.problem, (
        f"{outcome.cells}\n{(tmp_path / 'report.txt').read_text()[-20_000:]}"
    )
