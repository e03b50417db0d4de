"""CURVE keys: what a daemon on another machine is reached with.

Key files are those of :mod:`zmq.auth`: ``NAME.key`` holds the public key, ``NAME.key_secret`` both.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq

from gpuctl.errors import BadConfig

DEFAULT_NAME = "client"


@dataclass(frozen=True)
class KeyPair:
    """Both keys as 40 characters of Z85; ``file`` holds them."""

    public: bytes
    secret: bytes = field(repr=False)
    file: Path


def directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Where a user's settings are."""
    return Path(environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "gpuctl"


def new(name: str, environ: Mapping[str, str] = os.environ) -> KeyPair:
    """Make a key pair that nobody else can read.

    Raises:
        BadConfig: there is one of that name, or the folder cannot be written.
    """
    from zmq.auth import create_certificates  # noqa: PLC0415  few commands need it

    folder = directory(environ) / "keys"
    file = folder / f"{name}.key_secret"
    if file.exists():
        raise BadConfig(f"{file} exists", "take another --name, or remove it first")
    before = os.umask(0o077)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        create_certificates(folder, name)
    except OSError as refused:
        raise BadConfig(f"{folder}: {refused.strerror}") from None
    finally:
        os.umask(before)
    return read(file)


def read(file: Path) -> KeyPair:
    """The keys in a ``.key_secret`` file.

    Raises:
        BadConfig: not there, not a key file, without the secret, or readable by others.
    """
    from zmq.auth import load_certificate  # noqa: PLC0415  see new()

    try:
        public, secret = load_certificate(file)
        exposed = file.stat().st_mode & 0o077
    except (OSError, ValueError) as unreadable:
        raise BadConfig(f"{file}: {unreadable}", "make one: gpuctl keys new") from None
    if secret is None:
        raise BadConfig(f"{file} has no secret key", "name the .key_secret file")
    if exposed:
        raise BadConfig(f"{file} can be read by others", f"chmod 600 {file}")
    return KeyPair(checked(public.decode(), str(file)), secret, file)


def checked(public: str, where: str) -> bytes:
    """A public key, if it is one.

    Raises:
        BadConfig: not 40 characters of Z85; names ``where`` it stands.
    """
    from zmq.utils import z85  # noqa: PLC0415  see new()

    try:
        good = len(z85.decode(public)) == 32
    except (KeyError, ValueError, ArithmeticError):
        good = False
    if not good:
        raise BadConfig(f"{where}: {public!r} is not a public key", "it has 40 characters")
    return public.encode()


def secure(socket: zmq.Socket[Any], endpoint: str, environ: Mapping[str, str] = os.environ) -> None:
    """Encrypt and authenticate a client's connection, if it leaves the machine.

    Raises:
        BadConfig: the endpoint is on TCP and a key is missing or wrong.
    """
    if not endpoint.startswith("tcp://"):
        return
    settings = _settings(directory(environ) / "client.toml")
    server = environ.get("GPUCTL_SERVER_KEY") or settings.get("server_key")
    if not server:
        raise BadConfig(f"the public key of the daemon on {endpoint} is not known", _HINT)
    default = directory(environ) / "keys" / f"{DEFAULT_NAME}.key_secret"
    pair = read(Path(environ.get("GPUCTL_KEY") or settings.get("key") or default).expanduser())
    socket.curve_serverkey = checked(server, "GPUCTL_SERVER_KEY")
    socket.curve_publickey, socket.curve_secretkey = pair.public, pair.secret


_HINT = "set GPUCTL_SERVER_KEY, or server_key in ~/.config/gpuctl/client.toml"


def _settings(file: Path) -> dict[str, str]:
    import tomllib  # noqa: PLC0415  see new()

    try:
        settings = tomllib.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as unreadable:
        raise BadConfig(f"{file}: {unreadable}") from None
    unknown = sorted(settings.keys() - {"server_key", "key"})
    if unknown:
        raise BadConfig(f"{file}: unknown key {unknown[0]!r}", "known here: server_key, key")
    return {name: str(value) for name, value in settings.items()}
