"""What the supervisor does for workers that are not there any more."""

from __future__ import annotations

import signal
from unittest.mock import create_autospec

from gpuctld.forkserver import ForkServer
from gpuctld.supervisor import Supervisor


def test_a_worker_that_has_just_ended_is_sent_nothing(descriptor):
    """Its death may be known here while the fleet still decides upon earlier events."""
    supervisor = Supervisor({}, "main", lambda: create_autospec(ForkServer, instance=True))
    supervisor.send_descriptor(1, "model", descriptor)
    supervisor.signal(1, signal.SIGTERM)
