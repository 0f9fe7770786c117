"""The cameras of a site by their own names."""

from __future__ import annotations

from cumbre.core.configuration import Site
from cumbre.core.instrument import Instrument, load_instrument


def instrument_source(site: Site, item: str) -> str:
    """What :func:`load_instrument` takes for an entry of ``instruments`` in the site file."""
    return str(site.path(item)) if item.endswith((".yaml", ".yml")) else item


def site_instruments(site: Site) -> dict[str, tuple[str, Instrument]]:
    """Instrument name → (what :func:`load_instrument` takes, description)."""
    loaded = (
        (where, load_instrument(where))
        for where in (instrument_source(site, i) for i in site.config.instruments)
    )
    return {instrument.name: (where, instrument) for where, instrument in loaded}
