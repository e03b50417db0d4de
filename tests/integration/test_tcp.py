"""Clients of other machines: with a listed key, or not at all."""

from __future__ import annotations

import contextlib
import socket
from unittest.mock import patch

import pytest
import zmq

from gpuctl import AsyncClient, Client, keys, protocol
from gpuctl.errors import BadConfig, NoDaemon
from tests.integration.daemon import Daemon


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Key pairs by name, in a user's folder for settings."""
    home = tmp_path_factory.mktemp("settings")
    environ = {"XDG_CONFIG_HOME": str(home)}
    names = ("server", "client", "stranger")
    return home, {name: keys.new(name, environ) for name in names}


@pytest.fixture(scope="module")
def remote_daemon(made, tmp_path_factory, fork_servers):
    _, pairs = made
    port = free_port()
    more = (
        f'[tcp]\nlisten = "127.0.0.1:{port}"\nkey = "{pairs["server"].file}"\n'
        f'[tcp.clients]\nme = "{pairs["client"].public.decode()}"\n'
    )
    home = tmp_path_factory.mktemp("remote")
    daemon = Daemon(home, workers=1, more=more, fork_servers=fork_servers).start()
    daemon.tcp = f"tcp://127.0.0.1:{port}"
    yield daemon
    assert daemon.stop() == 0


@pytest.fixture
def settings(made, monkeypatch):
    """As a user with a key of the default name who knows the daemon's."""
    home, pairs = made
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home))
    monkeypatch.setenv("GPUCTL_SERVER_KEY", pairs["server"].public.decode())
    return pairs


def refused(daemon) -> NoDaemon:
    with pytest.raises(NoDaemon) as answer, Client(daemon.tcp) as client:
        client.ping()
    assert "[tcp.clients]" in answer.value.hint
    return answer.value


def test_a_listed_key_enters(remote_daemon, settings):
    with Client(remote_daemon.tcp, timeout=30) as client:
        assert client.ping()["pid"] == remote_daemon.process.pid
        assert client.load("shapes")["ok"]


async def _ping(endpoint: str) -> int:
    async with AsyncClient(endpoint) as client:
        return (await client.ping())["pid"]


def test_a_listed_key_enters_with_asyncio(remote_daemon, settings):
    import asyncio  # noqa: PLC0415

    assert asyncio.run(_ping(remote_daemon.tcp)) == remote_daemon.process.pid


def test_the_command_reads_a_settings_file(remote_daemon, settings, made):
    server, pair = settings["server"].public.decode(), settings["client"]
    file = made[0] / "gpuctl" / "client.toml"
    file.write_text(f'server_key = "{server}"\nkey = "{pair.file}"\n')
    environ = {**remote_daemon.environ, "XDG_CONFIG_HOME": str(made[0])}
    environ["GPUCTL_SOCKET"] = remote_daemon.tcp
    with patch.object(Daemon, "environ", environ):
        assert remote_daemon.cli("status").stdout
    file.unlink()


def test_a_key_that_is_not_listed_is_refused(remote_daemon, settings, monkeypatch):
    monkeypatch.setenv("GPUCTL_KEY", str(settings["stranger"].file))
    refused(remote_daemon)


def test_another_daemons_key_is_refused(remote_daemon, settings, monkeypatch):
    monkeypatch.setenv("GPUCTL_SERVER_KEY", settings["stranger"].public.decode())
    refused(remote_daemon)


def test_without_keys_the_client_says_what_is_missing(remote_daemon, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with pytest.raises(BadConfig, match="not known") as missing:
        Client(remote_daemon.tcp).ping()
    assert "GPUCTL_SERVER_KEY" in missing.value.hint
    monkeypatch.setenv("GPUCTL_SERVER_KEY", "x" * 40)
    with pytest.raises(BadConfig, match=r"client\.key_secret"):
        Client(remote_daemon.tcp).ping()


@pytest.mark.parametrize("mechanism", ["none", "plain"])
def test_a_bare_connection_cannot_talk(remote_daemon, mechanism):
    with zmq.Context() as context, context.socket(zmq.DEALER) as bare:
        bare.linger = 0
        if mechanism == "plain":
            bare.plain_username, bare.plain_password = b"root", b"root"
        bare.connect(remote_daemon.tcp)
        bare.send_multipart(protocol.encode(protocol.Ping()))
        assert not bare.poll(1_000)


def test_a_lease_over_tcp_ends_by_its_time(remote_daemon, settings):
    with Client(remote_daemon.tcp, timeout=30) as client:
        lease = client.ask(protocol.LeaseAcquire(ttl_s=0.5))["lease"]
        assert (lease["holder"]["pid"], lease["ttl_s"]) == (0, 0.5)
    remote_daemon.wait_for(lambda status: not status["leases"], 5)


def test_a_lease_over_tcp_without_a_time_gets_one(remote_daemon, settings):
    with Client(remote_daemon.tcp, timeout=30) as client:
        lease = client.ask(protocol.LeaseAcquire())["lease"]
        assert lease["ttl_s"] == 15
        client.ask(protocol.LeaseRelease(lease=lease["id"]))


def test_local_clients_need_no_key(remote_daemon):
    with remote_daemon.client() as client:
        assert client.ping()["pid"] == remote_daemon.process.pid


def test_many_connections_over_tcp_shut_both_entrances_for_a_while(own_daemon, made, settings):
    port = free_port()
    pairs = made[1]
    more = (
        f'[tcp]\nlisten = "127.0.0.1:{port}"\nkey = "{pairs["server"].file}"\n'
        f'[tcp.clients]\nme = "{pairs["client"].public.decode()}"\n'
    )
    daemon = own_daemon(workers=1, more=more, under=("prlimit", "--nofile=256:256"))
    local = daemon.client()
    local.ping()
    with contextlib.ExitStack() as opened:
        for _ in range(300):
            each = opened.enter_context(socket.socket())
            each.settimeout(0.05)
            with contextlib.suppress(OSError):
                each.connect(("127.0.0.1", port))
    daemon.wait_for(lambda status: not status["daemon"]["degraded"], 10)
    with Client(f"tcp://127.0.0.1:{port}", timeout=10) as remote:
        assert remote.ping()["pid"] == local.ping()["pid"] == daemon.process.pid
