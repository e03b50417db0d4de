"""The command ``gpuctl``."""

from gpuctl.cli.app import main

__all__ = ["main"]
