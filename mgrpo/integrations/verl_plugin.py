"""What verl loads through its entry points when it is imported: importing this module registers mgrpo with it.

verl logs a plugin that fails at level DEBUG and goes on without it; so this module logs the failure as an error itself
before it raises.
"""

from __future__ import annotations

import logging

from mgrpo.integrations import verl

try:
    verl.register()
except Exception:
    logging.getLogger(__name__).exception("verl goes on without mgrpo: its plugin failed")
    raise
