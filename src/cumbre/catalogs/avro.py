"""``python -m cumbre.catalogs.avro > alerts/schema/lsst.v11_1.alert.avsc``: the packets' schema file.

The alerts room reads the file that this prints; a test keeps both equal.
"""

from __future__ import annotations

import json
import sys

from cumbre.catalogs.schema import alert_schema


def text() -> str:
    """The Avro schema file, one field a line."""
    return json.dumps(alert_schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(text())
