from __future__ import annotations

import contextlib
import gzip
import io
import json
import struct
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cumbre.alerts import packet as packets
from cumbre.alerts.packet import decode_packet, packet_bytes, read_packets, write_container
from cumbre.catalogs import avro
from cumbre.catalogs.schema import level1_tables
from cumbre.core.errors import BadFileError, NotFoundError, UnprocessableDataError

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "alerts_rubin"
needs_real_alerts = pytest.mark.skipif(not DATA.is_dir(), reason="real Rubin alerts are not here")


def source(identifier: int = 1, **more: Any) -> dict[str, Any]:
    fixed = {"diaSourceId": identifier, "visit": 2026112000001, "detector": 3, "midpointMjdTai": 61364.1}
    fixed |= {"ra": 10.0, "dec": -20.0, "x": 1.5, "y": 2.5, "timeProcessedMjdTai": 61364.2}
    return fixed | {"psfNdata": 0, "trailNdata": 0, "dipoleNdata": 0, "bboxSize": 9} | more


def alert(**more: Any) -> dict[str, Any]:
    return {"diaSourceId": 1, "diaSource": source()} | more


def real_alerts() -> list[dict[str, Any]]:
    with gzip.open(DATA / "part-2-918301.avro.gz") as stream:
        return list(read_packets(io.BytesIO(stream.read())))


def test_schema_file_is_what_the_felis_file_says() -> None:
    import importlib.resources

    held = (
        importlib.resources.files("cumbre.alerts").joinpath("schema/lsst.v11_1.alert.avsc").read_text("utf-8")
    )
    assert held == avro.text(), (
        "run: python -m cumbre.catalogs.avro > src/cumbre/alerts/schema/lsst.v11_1.alert.avsc"
    )


def test_shape_is_that_of_rubin_v11_1() -> None:
    # counts published for lsst-alert-packet v11.1: diaSource 102, diaForcedSource 14, diaObject 82, ssSource 39,
    # mpc_orbits 53; twelve fields on top, all but two nullable
    fields = {record: len(parts[0]) for record, parts in packets._shapes().items()}
    assert {name.rpartition(".")[2]: count for name, count in fields.items()} == {
        "diaSource": 102, "diaForcedSource": 14, "diaObject": 82, "ssSource": 39, "mpc_orbits": 53, "alert": 12,
    }  # fmt: skip
    assert {name.rpartition(".")[0] for name in fields} == {"lsst.v11_1"}
    assert packets._shapes()["lsst.v11_1.alert"][1] == {"diaSourceId", "diaSource"}


def test_packet_comes_back_with_nan_as_null_and_numpy_as_numbers() -> None:
    record = alert(
        diaSource=source(
            psfFlux=np.float32(12.5), snr=float("nan"), visit=np.int64(2**50), isNegative=np.bool_(1)
        ),
        prvDiaSources=[source(2, band="r")],
        cutoutScience=b"\x00\xff",
    )
    sent = packet_bytes(record)
    assert sent[:5] == b"\x00" + struct.pack(">I", 1101)
    back = decode_packet(sent)
    assert (back["diaSource"]["psfFlux"], back["diaSource"]["snr"]) == (12.5, None)
    assert (back["diaSource"]["visit"], back["diaSource"]["isNegative"]) == (2**50, True)
    assert back["prvDiaSources"][0]["band"] == "r"
    assert (back["cutoutScience"], back["cutoutTemplate"], back["diaObject"]) == (b"\x00\xff", None, None)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"diaSourceId": 1}, "alert lacks diaSource"),
        (alert(diaSource={"diaSourceId": 1}), "diaSource lacks bboxSize"),
        (alert(diaSource=source(ra=float("nan"), dec=None)), "diaSource lacks dec"),
        (alert(diaSource=source(colour=1.0)), "no field 'colour'"),
        (alert(diaSource=source(band=5)), "does not fit"),
        (alert(cutoutScience="text"), "does not fit"),
        (alert(diaSource=source(visit=2**70)), "does not fit"),
    ],
)
def test_records_that_do_not_fit_are_refused_with_the_field(record: dict[str, Any], words: str) -> None:
    with pytest.raises(UnprocessableDataError, match=words):
        packet_bytes(record)


@needs_real_alerts
def test_real_alerts_share_names_and_types() -> None:
    """Every field of Rubin's v10.0 packets is in ours with the same type."""
    with gzip.open(DATA / "part-2-918301.avro.gz") as stream:
        theirs = fastavro.reader(io.BytesIO(stream.read())).writer_schema
    records = {
        "diaSource": "DiaSource", "prvDiaSources": "DiaSource", "prvDiaForcedSources": "DiaForcedSource",
        "diaObject": "DiaObject", "ssSource": "SSSource", "mpc_orbits": "mpc_orbits",
    }  # fmt: skip
    compared = 0
    for field in theirs["fields"]:
        if field["name"] not in records:
            continue
        record = _record(field["type"])
        ours = {column.name: column.datatype for column in level1_tables()[records[field["name"]]].columns}
        for inner in record["fields"]:
            (kind,) = [t for t in _flat(inner["type"]) if t != "null"]
            expected = {"timestamp": "long"}.get(ours[inner["name"]], ours[inner["name"]])
            assert kind == expected, f"{field['name']}.{inner['name']}"
            compared += 1
    assert compared == 98 + 98 + 14 + 82 + 39 + 53


@needs_real_alerts
def test_real_alerts_survive_our_packet() -> None:
    shapes = packets._shapes()

    def project(value: Any, name: str) -> Any:
        if isinstance(value, list):
            return [project(item, name) for item in value]
        return None if value is None else {k: v for k, v in value.items() if k in shapes[name][0]}

    originals = real_alerts()
    assert len(originals) == 7
    for original in originals:
        record = {key: value for key, value in original.items() if key in shapes["lsst.v11_1.alert"][0]}
        for key, name in shapes["lsst.v11_1.alert"][2].items():
            record[key] = project(record[key], name)
        if (record["ssSource"] or {}).get("diaSourceId") is None:
            record["ssSource"] = None  # Fink writes an empty record where Rubin writes null
        if (record["mpc_orbits"] or {}).get("id") is None:
            record["mpc_orbits"] = None
        if (record["diaObject"] or {}).get("diaObjectId") is None:
            record["diaObject"] = None
        back = decode_packet(packet_bytes(record))
        for key in ("ra", "dec", "psfFlux", "visit", "reliability", "ssObjectId"):
            assert back["diaSource"][key] == original["diaSource"][key]
        assert back["cutoutScience"] == original["cutoutScience"]
        for sent, came in zip(record["prvDiaSources"] or [], back["prvDiaSources"] or [], strict=True):
            assert {k: came[k] for k in sent} == sent
        assert back["diaSource"]["exposureTime"] is None  # new in v11.1


@needs_real_alerts
def test_our_packets_are_read_by_a_reader_of_the_older_schema() -> None:
    """Avro's schema resolution: a broker that still has the real v10 names and types reads us."""
    with gzip.open(DATA / "part-2-918301.avro.gz") as stream:
        theirs = fastavro.reader(io.BytesIO(stream.read())).writer_schema
    reader = {"type": "record", "name": "alert", "namespace": "lsst.v11_1", "fields": []}
    for field in theirs["fields"]:
        if field["name"] in ("diaSourceId", "observation_reason"):
            reader["fields"].append({**field, "default": None, "type": ["null", _plain(field["type"])]})
        if field["name"] == "diaSource":
            inner = [
                {"name": f["name"], "type": ["null", _plain(f["type"])], "default": None}
                for f in _record(field["type"])["fields"]
            ]
            record = {"type": "record", "name": "diaSource", "namespace": "lsst.v11_1", "fields": inner}
            reader["fields"].append({"name": "diaSource", "type": record})
    sent = packet_bytes(alert(diaSource=source(psfFlux=5.0, band="g", exposureTime=30.0)))
    read = fastavro.schemaless_reader(io.BytesIO(sent[5:]), packets.schema(), fastavro.parse_schema(reader))
    assert (read["diaSource"]["psfFlux"], read["diaSource"]["band"]) == (5.0, "g")


@needs_real_alerts
def test_real_wire_packets_of_unknown_versions_say_so() -> None:
    for path in sorted((DATA / "confluent_wire").glob("*.avro.gz")):
        with pytest.raises(BadFileError, match=r"unknown schema id (701|703|900)"):
            decode_packet(gzip.decompress(path.read_bytes()))


def test_other_versions_can_be_registered() -> None:
    other = {"type": "record", "name": "alert", "fields": [{"name": "diaSourceId", "type": "long"}]}
    packets.register(4242, other)
    assert decode_packet(struct.pack(">bI", 0, 4242) + b"\x0e") == {"diaSourceId": 7}


def test_container_holds_all_records_and_its_schema(tmp_path: Path) -> None:
    path = tmp_path / "visit.avro"
    done = write_container(path, (alert(diaSource=source(i), diaSourceId=i) for i in range(5)))
    assert done.size == path.stat().st_size
    assert [record["diaSourceId"] for record in read_packets(path)] == list(range(5))
    with path.open("rb") as stream:
        assert json.dumps(fastavro.reader(stream).writer_schema).count("diaForcedSourceId") == 1
    with pytest.raises(NotFoundError, match=r"absent\.avro"):
        list(read_packets(tmp_path / "absent.avro"))


def test_damaged_container_gives_what_precedes_the_damage(tmp_path: Path) -> None:
    path = tmp_path / "visit.avro"
    write_container(path, [alert()])
    with pytest.raises(BadFileError):
        list(read_packets(path.read_bytes()[:-20]))


GOOD = packet_bytes(alert(prvDiaSources=[source(2)], cutoutScience=b"x" * 40))


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=400) | st.binary(max_size=400).map(lambda b: GOOD[:5] + b))
def test_random_bytes_are_a_bad_file_or_a_record(content: bytes) -> None:
    with contextlib.suppress(BadFileError):
        assert isinstance(decode_packet(content), dict)
    with contextlib.suppress(BadFileError):
        list(read_packets(content))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255), st.booleans())
def test_damaged_packets_are_a_bad_file_or_a_record(position: int, change: int, cut: bool) -> None:
    content = (
        GOOD[:position] if cut else bytes(b ^ change if i == position else b for i, b in enumerate(GOOD))
    )
    if cut:
        with pytest.raises(BadFileError):
            decode_packet(content)
        return
    with contextlib.suppress(BadFileError):
        assert isinstance(decode_packet(content), dict)


def _flat(kind: Any) -> list[Any]:
    return [item for part in kind for item in _flat(part)] if isinstance(kind, list) else [kind]


def _plain(kind: Any) -> Any:
    return next(item for item in _flat(kind) if item != "null")


def _record(kind: Any) -> dict[str, Any]:
    plain = _plain(kind)
    return _record(plain["items"]) if plain["type"] == "array" else plain
