"""The image ledger: one record per image and detector from shutter to alert.

In: ``Image.hop`` of every service and the camera's events. Out: tables ``ledger.image``, ``ledger.hop``,
``ledger.hop_history`` and the view ``ledger.status``; "where is it, what is missing, why" as one call each,
and the only word on whether a copy may be deleted. Serves the archiving, catch-up and traceability numbers.
"""

from cumbre.ledger.queries import Ledger
from cumbre.ledger.schema import prepare
from cumbre.ledger.service import LedgerService

__all__ = ["Ledger", "LedgerService", "prepare"]
