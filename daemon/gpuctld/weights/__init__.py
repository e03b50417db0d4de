"""Where the speed is: one host copy of a model's weights, and slabs on devices that come and go.

Inference does not change weights, so an unload copies nothing back: it unmaps. The only package
that knows about devices' memory.
"""

from gpuctld.weights.context import Context, context
from gpuctld.weights.gauge import Gauge, gauge
from gpuctld.weights.layout import Layout
from gpuctld.weights.reading import ModelSource
from gpuctld.weights.rendezvous import Listener, Meeting
from gpuctld.weights.resident import Resident, attach, attach_parked, load

__all__ = [
    "Context",
    "Gauge",
    "Layout",
    "Listener",
    "Meeting",
    "ModelSource",
    "Resident",
    "attach",
    "attach_parked",
    "context",
    "gauge",
    "load",
]
