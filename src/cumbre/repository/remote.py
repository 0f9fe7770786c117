"""A site's images as a Butler over the network."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cumbre.core.errors import UserError
from cumbre.repository.storage import STORAGE_CLASSES

if TYPE_CHECKING:
    from lsst.daf.butler import Butler

TOKEN = "BUTLER_RUBIN_ACCESS_TOKEN"  # noqa: S105 (the name of an environment variable)
"""Where the middleware's own client looks for a token."""


def know_storage_classes() -> None:
    """Tell the middleware of this process how our data sets are held in memory; a remote Butler does not."""
    from lsst.daf.butler import Config, StorageClassConfig, StorageClassFactory

    factory = StorageClassFactory()
    if any(name not in factory for name in STORAGE_CLASSES):
        factory.addFromConfig(StorageClassConfig(Config({"storageClasses": STORAGE_CLASSES})))


def connect(url: str, token: str | None = None, *, collections: str | list[str] | None = None) -> Butler:
    """A Butler of what is released to the owner of a token.

    Parameters
    ----------
    url
        Address of the site (``cat DIR/run/web.url``).
    token
        Of the site, with the scope ``read:image``; without it that of the environment variable
        ``BUTLER_RUBIN_ACCESS_TOKEN``.
    collections
        Searched without being named.

    Raises
    ------
    UserError
        There is no token.
    """
    from lsst.daf.butler._butler_instance_options import ButlerInstanceOptions
    from lsst.daf.butler.remote_butler._factory import RemoteButlerFactory

    token = token or os.environ.get(TOKEN)
    if not token:
        raise UserError(f"no token: give one, or put it into {TOKEN}; cumbre token create makes one")
    know_storage_classes()
    factory = RemoteButlerFactory.create_factory_for_url(f"{url.rstrip('/')}/butler/")
    options = ButlerInstanceOptions(collections=collections)
    return factory.create_butler_for_access_token(token, butler_options=options)
