"""gpuctl: the light client of gpuctld. It needs pyzmq and msgpack, and loads no torch."""

from typing import Any

from gpuctl.errors import GpuctlError

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "GpuctlError", "Job"]

_LAZY = {"Client": "client", "AsyncClient": "aio", "Job": "jobs"}


def __getattr__(name: str) -> Any:
    """Import the clients when they are first asked for: ``import gpuctl`` stays instant."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415

    return getattr(import_module(f"gpuctl.{_LAZY[name]}"), name)
