"""History encoded by columns is byte for byte what the Avro library writes."""

from __future__ import annotations

import io
import math

import fastavro
import numpy as np
import pyarrow as pa
import pytest

from cumbre.alerts.encode import by_object, encode_table
from cumbre.alerts.packet import clean_record, decode_packet, packet_bytes, schema
from cumbre.core.errors import UnprocessableDataError


def sources(n: int) -> list[dict[str, object]]:
    rng = np.random.default_rng(3)
    rows = []
    for k in range(n):
        rows.append(
            {
                "diaSourceId": int(rng.integers(-(2**62), 2**62)), "visit": 2026112000001 + k, "detector": k % 189,
                "diaObjectId": [7, -9, None][k % 3], "ssObjectId": None, "midpointMjdTai": 61364.1 + k,
                "ra": float(rng.uniform(0, 360)), "dec": -20.0, "x": 1.5, "y": 2.5, "timeProcessedMjdTai": 61364.2,
                "psfFlux": float(np.float32(rng.normal())), "snr": math.nan if k % 4 else 6.5, "psfNdata": k,
                "trailNdata": 0, "dipoleNdata": 0, "bboxSize": 31, "band": ["r", "g", None, "é"][k % 4],
                "isNegative": [True, False, None][k % 3], "reliability": 0.75,
            }
        )  # fmt: skip
    return rows


def record_schema() -> object:
    (field,) = [f for f in schema()["fields"] if f["name"] == "diaSource"]
    return fastavro.parse_schema(field["type"])


def test_bytes_are_those_of_fastavro() -> None:
    rows = sources(40)
    encoded = encode_table("diaSource", pa.Table.from_pylist(rows))
    for k, row in enumerate(rows):
        stream = io.BytesIO()
        whole = clean_record({"diaSourceId": 1, "diaSource": row})
        fastavro.schemaless_writer(stream, record_schema(), whole["diaSource"])
        assert encoded.content[encoded.offsets[k] : encoded.offsets[k + 1]].tobytes() == stream.getvalue()


def test_packet_with_encoded_history_equals_that_of_rows() -> None:
    rows = sources(30)
    forced = [
        {
            "diaForcedSourceId": k, "diaObjectId": 7, "ra": 10.0, "dec": -20.0, "visit": 1, "detector": 2,
            "psfFlux": 1.5, "midpointMjdTai": 61000.0 + k, "timeProcessedMjdTai": 61000.1, "band": "r",
        }
        for k in range(4)
    ]  # fmt: skip
    plain = {"diaSourceId": 5, "diaSource": rows[0], "cutoutScience": b"abc"}
    mine = [row for row in rows if row["diaObjectId"] == 7]
    encoded = {
        "prvDiaSources": by_object("diaSource", rows)[7],
        "prvDiaForcedSources": by_object("diaForcedSource", pa.Table.from_pylist(forced))[7],
    }
    assert packet_bytes(plain | encoded) == packet_bytes(
        plain | {"prvDiaSources": mine, "prvDiaForcedSources": forced}
    )
    back = decode_packet(packet_bytes(plain | encoded))
    assert [r["diaSourceId"] for r in back["prvDiaSources"]] == [r["diaSourceId"] for r in mine]
    assert list(encoded["prvDiaSources"]) == back["prvDiaSources"]


def test_rows_without_object_and_empty_history_are_left_out() -> None:
    assert set(by_object("diaSource", sources(9))) == {7, -9}
    assert by_object("diaSource", None) == {}
    assert by_object("diaSource", []) == {}


def test_missing_required_column_is_named() -> None:
    table = pa.Table.from_pylist(sources(3)).drop_columns(["visit"])
    with pytest.raises(UnprocessableDataError, match="diaSource lacks visit"):
        encode_table("diaSource", table)
