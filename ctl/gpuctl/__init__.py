"""gpuctl: the light client of gpuctld. It needs pyzmq and msgpack, and loads no torch."""

__version__ = "0.1.0"
