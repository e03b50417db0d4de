import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.fakes.tiny_models import tiny_stable_diffusion
from tests.systemd.machine import CHECKOUT, Machine, why_not

BIG_WORDS = 2_000_000
"""256 MB of weights: long enough under way to be seen, and more than a test leaves room for."""

NEEDED = (
    *("ctl", "daemon", "demo", "systemd", "docs"),
    *("Makefile", "README.md", "LICENSE", "setup.cfg", "pyproject.toml", "constraints.txt"),
)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    reason = why_not()
    if reason:
        pytest.skip(f"no systemd machine here: {reason}")
    booted = Machine.boot(stage(tmp_path_factory.mktemp("stage")))
    try:
        yield booted
    finally:
        booted.close()


def stage(folder: Path) -> Path:
    """A copy of the program, and two models: readable for the service's user whatever the umask."""
    (folder / "src").mkdir()
    for name in NEEDED:
        subprocess.run(
            ["cp", "-r", "--preserve=timestamps", CHECKOUT / name, folder / "src"], check=True
        )
    tiny_stable_diffusion(folder / "models" / "tiny")
    tiny_stable_diffusion(folder / "models" / "big", BIG_WORDS)
    subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
    return folder
