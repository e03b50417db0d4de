from __future__ import annotations

import pytest
from click.testing import CliRunner

from gpuctl import keys
from gpuctl.cli.app import gpuctl
from gpuctl.errors import BadConfig
from gpuctld import config, remote


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path / "gpuctl" / "keys"


def test_a_new_pair_is_private_and_its_line_is_for_the_daemon(home):
    done = CliRunner().invoke(gpuctl, ["keys", "new", "--name", "laptop"])
    secret = home / "laptop.key_secret"
    assert secret.stat().st_mode & 0o777 == 0o600
    assert home.stat().st_mode & 0o777 == 0o700
    line = f'laptop = "{keys.read(secret).public.decode()}"'
    assert line in done.output
    assert config.parse(f"[tcp.clients]\n{line}\n").tcp.clients.keys() == {"laptop"}
    assert keys.read(secret).secret.decode() not in done.output


def test_a_pair_is_never_overwritten(home):
    before = keys.new("server").public
    with pytest.raises(BadConfig, match="exists"):
        keys.new("server")
    assert keys.read(home / "server.key_secret").public == before


@pytest.mark.parametrize("name", ["../up", "a b", ""])
def test_a_name_is_no_path(home, name):
    assert CliRunner().invoke(gpuctl, ["keys", "new", "--name", name]).exit_code == 2
    assert not home.exists()


def test_a_secret_that_others_can_read_is_refused(home):
    file = keys.new("server").file
    file.chmod(0o640)
    with pytest.raises(BadConfig, match="read by others"):
        keys.read(file)


def test_the_public_half_is_not_enough(home):
    keys.new("server")
    with pytest.raises(BadConfig, match="no secret key"):
        keys.read(home / "server.key")


GOOD = "clients = { me = 'rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7' }\n"


@pytest.mark.parametrize(
    ("tcp", "says"),
    [
        ("listen = '127.0.0.1:5757'\n" + GOOD, "own key"),
        ("listen = '127.0.0.1:5757'\nkey = '{key}'\n", "lists nobody"),
        (
            "listen = '127.0.0.1:5757'\nkey = '{key}'\nclients = { me = 'short' }\n",
            "clients.me",
        ),
        ("listen = '127.0.0.1:5757'\nkey = '/nowhere'\n" + GOOD, "/nowhere"),
        ("listen = 'everywhere'\nkey = '{key}'\n" + GOOD, "ADDRESS:PORT"),
        (GOOD, "no address"),
    ],
)
def test_without_keys_nobody_listens(home, tcp, says):
    home.mkdir(parents=True, exist_ok=True)
    file = keys.new("server").file
    settings = config.parse("[tcp]\n" + tcp.replace("{key}", str(file)))
    with pytest.raises(BadConfig, match=says):
        remote.from_config(settings)


def test_tcp_is_off_by_default():
    assert remote.from_config(config.Config()) is None
