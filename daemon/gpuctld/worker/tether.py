"""Preloaded first: the fork server is gone with the controller even during its long imports.

Its own death in turn takes the workers. The kernel does both, whatever the processes do.

The collector finds nothing in these imports and costs a fifth of their time: it is off for them.
"""

import gc

from gpuctld.worker.lifeline import die_with_parent

die_with_parent()
gc.disable()
