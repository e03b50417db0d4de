from collections.abc import Iterator

import pytest
from tests.systemd.machine import Machine, why_not


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    reason = why_not()
    if reason:
        pytest.skip(f"no systemd machine here: {reason}")
    booted = Machine.boot()
    try:
        yield booted
    finally:
        booted.close()
