"""NVML is asked by a helper that may hang or end; whoever wants a figure never waits for long."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from gpuctld.weights import nvml_gauge

FAKES = Path(__file__).parents[2] / "fakes" / "nvml"


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """A file with the bytes in use; 0 hangs the driver, less than 0 ends the helper."""
    monkeypatch.setenv("PYTHONPATH", f"{FAKES}:{FAKES.parents[2]}/daemon")
    monkeypatch.setenv("GPUCTL_TEST_NVML", str(tmp_path / "used"))
    (tmp_path / "used").write_text("400")
    return tmp_path / "used"


@pytest.fixture
def gauge(driver):
    made = nvml_gauge.NvmlGauge("GPU-1")
    yield made
    made._helper.kill()
    made._helper.wait()


def test_memory_and_processes_are_what_the_driver_says(gauge):
    assert gauge.memory() == {"total": 1000, "used": 400, "free": 600}
    assert gauge.residual() == 7
    assert [(each["pid"], each["bytes"]) for each in gauge.foreign()] == [(1, 3)]
    assert gauge.age_s < 1


@pytest.mark.parametrize(("used", "wish"), [("400", ""), ("13", "a reset of the GPU"), ("14", "")])
def test_the_drivers_wish_after_a_fault(gauge, driver, used, wish):
    driver.write_text(used)
    assert gauge.recovery() == wish


def test_a_hanging_driver_leaves_the_last_sample_with_its_age(gauge, driver, monkeypatch):
    gauge.memory()
    monkeypatch.setattr(nvml_gauge, "PATIENCE_S", 0.2)
    driver.write_text("0")
    started = time.monotonic()
    assert gauge.memory()["used"] == 400
    assert gauge.memory()["used"] == 400, "while an answer is late nobody waits again"
    assert time.monotonic() - started < 0.4
    assert gauge.age_s > 0.15
    driver.write_text("500")
    time.sleep(0.2)
    gauge.memory()
    assert gauge.memory()["used"] == 500
    assert gauge.age_s < 0.15


def test_a_helper_that_ended_is_replaced(gauge, driver):
    gauge.memory()
    driver.write_text("-1")
    assert gauge.memory()["used"] == 400
    driver.write_text("600")
    gauge._helper.wait()
    assert gauge.memory()["used"] == 600


def test_the_helper_ends_with_us(driver):
    made = nvml_gauge.NvmlGauge("GPU-1")
    made.memory()
    made._channel.close()
    assert made._helper.wait(5) == 0
