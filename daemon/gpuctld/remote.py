"""The TCP entrance: off unless configured, and then for listed CURVE keys only."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import zmq
from zmq.auth.thread import ThreadAuthenticator

from gpuctl import keys
from gpuctl.errors import BadConfig
from gpuctl.keys import KeyPair
from gpuctld.config import Config

DOMAIN = b"gpuctl"
HEARTBEAT_MS = 5_000
"""A peer that has gone without a word is dropped after three of them."""


@attrs.frozen
class Remote:
    """Where to listen, as whom, and which public keys may enter."""

    endpoint: str
    pair: KeyPair
    clients: frozenset[bytes]

    def callback(self, _domain: str, key: bytes) -> bool:
        """Whether a key is listed; the name is what :mod:`zmq.auth` calls."""
        return key in self.clients


def from_config(settings: Config) -> Remote | None:
    """What ``[tcp]`` says; ``None`` where it says nothing.

    Raises:
        BadConfig: an address, a key file or a key is missing or wrong.
    """
    tcp = settings.tcp
    if tcp.listen is None:
        if tcp.key or tcp.clients:
            raise BadConfig("[tcp] has keys but no address", 'listen = "ADDRESS:PORT"')
        return None
    if not re.fullmatch(r"[\w.*-]+:\d{1,5}", tcp.listen):
        raise BadConfig(f"tcp.listen: {tcp.listen!r} is not ADDRESS:PORT")
    if tcp.key is None:
        raise BadConfig("[tcp] needs the daemon's own key", "gpuctl keys new --name server")
    if not tcp.clients:
        raise BadConfig("[tcp.clients] lists nobody", "gpuctl keys new, on each client")
    pair = keys.read(settings.base_dir / Path(tcp.key).expanduser())
    return Remote(f"tcp://{tcp.listen}", pair, _listed(tcp.clients))


def _listed(clients: Mapping[str, str]) -> frozenset[bytes]:
    return frozenset(keys.checked(key, f"tcp.clients.{name}") for name, key in clients.items())


class TcpEntrance:
    """A bound TCP address. Shutting it ends its connections; clients connect anew later.

    Make it after the other entrances of a socket: its options hold for what is bound from then on.
    """

    def __init__(self, door: zmq.Socket[Any], context: zmq.Context[Any], remote: Remote) -> None:
        self._door = door
        self._endpoint = remote.endpoint
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(DOMAIN.decode(), remote)
        door.curve_server = True
        door.curve_publickey, door.curve_secretkey = remote.pair.public, remote.pair.secret
        door.zap_domain = DOMAIN
        door.set(zmq.ZAP_ENFORCE_DOMAIN, 1)  # nobody enters if the authenticator has died
        door.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        door.set(zmq.HEARTBEAT_TIMEOUT, 3 * HEARTBEAT_MS)
        if not self.open():
            self.close()
            raise BadConfig(f"{remote.endpoint}: cannot listen there")

    def open(self) -> bool:
        """Listen; false when somebody else has the address."""
        try:
            self._door.bind(self._endpoint)
        except zmq.ZMQError:
            return False
        return True

    def shut(self) -> None:
        """Stop listening, if it does."""
        with contextlib.suppress(zmq.ZMQError):
            self._door.unbind(self._endpoint)

    def close(self) -> None:
        """End the authenticator."""
        self._authenticator.stop()
