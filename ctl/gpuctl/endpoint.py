"""How a client's socket gets to the daemon."""

from __future__ import annotations

from typing import Any

import zmq

from gpuctl import keys
from gpuctl.errors import BadConfig


def connect(socket: zmq.Socket[Any], endpoint: str) -> None:
    """Connect; encrypted and with our key if the connection leaves the machine.

    Raises:
        BadConfig: a key is missing or wrong, or ZeroMQ takes no such endpoint.
    """
    keys.secure(socket, endpoint)
    try:
        socket.connect(endpoint)
    except zmq.ZMQError as refused:
        reason = zmq.strerror(refused.errno or 0)
        raise BadConfig(f"{endpoint}: {reason}", "ipc:///PATH or tcp://HOST:PORT") from None
