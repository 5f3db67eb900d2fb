"""Reading a run's reports: all that the store has, page by page, and each checked before anything is made of it.

Whoever takes part in a run may report, so a report may have another version's form, or none. Such a one is passed on as
a line for people that names it; it never ends who reads it.
"""

from __future__ import annotations

from collections.abc import Iterator

from mgrpo.store.client import StoreClient
from mgrpo.store.records import Reported
from mgrpo.store.reports import MALFORMED, checked, values_of

__all__ = ["MALFORMED", "checked", "every_report", "values_of"]


def every_report(client: StoreClient, after: int) -> Iterator[Reported]:
    """The reports with a number beyond `after` that the store has now, in order."""
    while page := client.reports(after=after):
        yield from map(checked, page)
        after = page[-1].seq
