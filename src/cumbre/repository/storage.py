"""Storage classes of our datasets, declared in a repository's ``butler.yaml``.

The classes that read and write are named, not imported: the middleware imports them when it needs them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from cumbre.core.errors import NotFoundError
from cumbre.stores.files import write_atomic

EXPOSURE = "CumbreExposure"
ALERTS = "CumbreAlerts"
RAW = "CumbreFits"
STORAGE_CLASSES: dict[str, dict[str, Any]] = {
    RAW: {
        "pytype": "cumbre.repository.fits_image.FitsImage",
        "delegate": "cumbre.repository.delegate.FitsDelegate",
        "derivedComponents": {"header": "StructuredDataDict"},
    },
    EXPOSURE: {
        "pytype": "cumbre.payloads.exposure.Exposure",
        "delegate": "cumbre.pipelines.delegate.ExposureDelegate",
        "derivedComponents": {"metadata": "StructuredDataDict", "metrics": "StructuredDataDict"},
    },
    ALERTS: {"pytype": "list"},
}
FORMATTERS = {
    RAW: "cumbre.repository.formatter.FitsFormatter",
    EXPOSURE: "cumbre.pipelines.formatters.ExposureFormatter",
    ALERTS: "cumbre.pipelines.formatters.AlertsFormatter",
}


def declare(root: Path) -> bool:
    """Add the storage classes to a repository made before there were all of them; gives whether any was missing.

    Processes that have the repository open know them after they open it again.

    Raises
    ------
    NotFoundError
        There is no repository in the folder.
    """
    path = root / "butler.yaml"
    if not path.is_file():
        raise NotFoundError(f"{root}: no Butler repository here (no butler.yaml)")
    config = yaml.safe_load(path.read_text())
    known = config.setdefault("storageClasses", {})
    formatters = config.setdefault("datastore", {}).setdefault("formatters", {})
    wanted = known | STORAGE_CLASSES, formatters | FORMATTERS
    if (known, formatters) == wanted:
        return False
    config["storageClasses"], config["datastore"]["formatters"] = wanted
    write_atomic(path, yaml.safe_dump(config).encode())
    return True
