"""Preloaded first: the fork server is gone with the controller even during its long imports.

Its own death in turn takes the workers. The kernel does both, whatever the processes do.
"""

from gpuctld.worker.lifeline import die_with_parent

die_with_parent()
