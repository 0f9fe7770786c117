"""Middleware instrument classes, one for each description: ``cumbre.repository.instruments.LSSTCam``.

The registry stores a class name for each instrument, and the middleware makes the instrument from nothing but
that name. So the classes are made when they are asked for: from the shipped descriptions, or from
``NAME.yaml`` in the folders of the environment variable ``CUMBRE_INSTRUMENTS``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

from lsst.daf.butler import Registry
from lsst.pipe.base import Instrument as MiddlewareInstrument

from cumbre.core.errors import NotFoundError
from cumbre.core.instrument import Instrument, load_instrument, shipped_instruments
from cumbre.repository.storage import RAW

SEARCH_VARIABLE = "CUMBRE_INSTRUMENTS"
_classes: dict[str, type[CumbreInstrument]] = {}


class CumbreInstrument(MiddlewareInstrument):  # type: ignore[misc]
    """An instrument that is described by data."""

    description: ClassVar[Instrument]
    raw_definition = ("raw", ("instrument", "exposure", "detector"), RAW)

    @classmethod
    def getName(cls) -> str:  # noqa: N802 -- the middleware's name
        """Name as in the description."""
        return cls.description.name

    def getRawFormatter(self, dataId: Any) -> Any:  # noqa: N802
        """The same formatter for all raws."""
        del dataId
        from cumbre.repository.formatter import FitsFormatter

        return FitsFormatter

    def register(self, registry: Registry, *, update: bool = False) -> None:
        """Write the instrument, its detectors, filters and visit systems to a registry."""
        from cumbre.repository.records import instrument_records

        with registry.transaction():
            for element, rows in instrument_records(self.description, class_name(self.description)).items():
                for row in rows:
                    registry.syncDimensionData(element, row, update=update)


def class_name(instrument: Instrument) -> str:
    """Importable name of an instrument's class."""
    return f"{__name__}.{instrument.name.replace('-', '_')}"


def instrument_class(instrument: Instrument) -> type[CumbreInstrument]:
    """Middleware class of a description."""
    name = instrument.name.replace("-", "_")
    known = _classes.get(name)
    if known is None or known.description != instrument:
        known = type(name, (CumbreInstrument,), {"description": instrument, "__module__": __name__})
        _classes[name] = known
    return known


def _find(name: str) -> Instrument | None:
    for folder in os.environ.get(SEARCH_VARIABLE, "").split(os.pathsep):
        for path in sorted(Path(folder).glob("*.y*ml")) if folder else []:
            found = load_instrument(path)
            if found.name.replace("-", "_") == name:
                return found
    for shipped in shipped_instruments():
        found = load_instrument(shipped)
        if found.name.replace("-", "_") == name:
            return found
    return None


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    if name in _classes:
        return _classes[name]
    try:
        found = _find(name)
    except NotFoundError as error:
        raise AttributeError(str(error)) from error
    if found is None:
        raise AttributeError(
            f"no instrument description is called {name!r}: it is not shipped, and no file of the folders in "
            f"{SEARCH_VARIABLE} has this name"
        )
    return instrument_class(found)
