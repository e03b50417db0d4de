import logging

import pytest

from gpuctl import paths
from gpuctld.__main__ import main


@pytest.fixture(autouse=True)
def _logging():
    """The daemon's own logging ends with the test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize(
    ("text", "word"), [("[daemon]\ndevcies = 1\n", "devices"), ("[daemon", "not TOML"), ("", "GPU")]
)
def test_a_wrong_configuration_is_78_and_says_why(tmp_path, monkeypatch, capfd, text, word):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    file = tmp_path / "config.toml"
    file.write_text(text)
    assert main(["--config", str(file)]) == 78
    said = capfd.readouterr().err
    assert "not_started" in said
    assert word in said
    assert "Traceback" not in said


def test_an_address_that_is_no_local_socket_is_refused(tmp_path, capfd):
    file = tmp_path / "config.toml"
    file.write_text('[daemon]\ndevices = ["cpu"]\nsocket = "tcp://127.0.0.1:5555"\n')
    assert main(["--config", str(file)]) == 78
    assert "only ipc://" in capfd.readouterr().err


def test_everybody_may_use_a_socket_that_does_not_exist(tmp_path):
    assert paths.permitted(f"ipc://{tmp_path}/none.sock")


def test_a_socket_in_a_closed_folder_is_not_permitted(tmp_path, monkeypatch):
    def closed(_):
        raise PermissionError

    monkeypatch.setattr("pathlib.Path.exists", closed)
    assert not paths.permitted(f"ipc://{tmp_path}/gpuctl.sock")
