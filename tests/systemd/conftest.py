import subprocess
from collections.abc import Iterator

import pytest
from tests.fakes.tiny_models import tiny_stable_diffusion
from tests.systemd.machine import Machine, why_not


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    reason = why_not()
    if reason:
        pytest.skip(f"no systemd machine here: {reason}")
    models = tmp_path_factory.mktemp("models")
    tiny_stable_diffusion(models / "tiny")
    subprocess.run(["chmod", "-R", "a+rX", models], check=True)  # for the service's own user
    booted = Machine.boot(models)
    try:
        yield booted
    finally:
        booted.close()
