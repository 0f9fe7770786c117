"""The topic files, the law of field values, and the Avro schemas made from them."""

import json
import math
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fastavro
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cumbre.bus import avro, default_topics, load_topics, open_bus
from cumbre.bus.schemas import RegistrySchemas
from cumbre.core.errors import ConfigurationError, FatalError, TransientError, UserError

KITCHEN = """
component: Kitchen
description: One field of every type.
topics:
  sink:
    kind: event
    keep: all
    description: all types
    fields:
      truth: {type: boolean, description: d}
      small: {type: int, description: d}
      large: {type: long, description: d}
      single: {type: float, description: d, unit: m}
      twice: {type: double, description: d, default: 1.5}
      words: {type: string, description: d}
      raw: {type: bytes, description: d}
      twices: {type: "double[]", description: d}
      names: {type: "string[]", description: d}
      blobs: {type: "bytes[]", description: d}
"""
VALUES = st.fixed_dictionaries(
    {},
    optional={
        "truth": st.booleans(),
        "small": st.integers(-(2**31), 2**31 - 1),
        "large": st.integers(-(2**63), 2**63 - 1),
        "single": st.floats(width=32),
        "twice": st.floats(),
        "words": st.text(),
        "raw": st.binary(),
        "twices": st.lists(st.floats(), max_size=5),
        "names": st.lists(st.text(), max_size=5),
        "blobs": st.lists(st.binary(max_size=20), max_size=3),
    },
)


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("topics")
    (folder / "Kitchen.yaml").write_text(KITCHEN)
    return load_topics(folder)


def same(left, right):
    """Equal, NaN equal to NaN, and of one type."""
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float) and math.isnan(left):
        return type(right) is float and math.isnan(right)
    if isinstance(left, float):
        return type(right) is float and struct.pack("d", left) == struct.pack("d", right)
    return type(left) is type(right) and left == right


@pytest.fixture(scope="module", params=["embedded", "kafka-mock"])
def kitchen_bus(request, kitchen, tmp_path_factory):
    if request.param == "embedded":
        url = f"sqlite://{tmp_path_factory.mktemp('bus')}/bus.db"
    else:
        servers = request.getfixturevalue("mock_servers")
        url = f"kafka://{servers}?prefix=kitchen&create=no&fetch.wait.max.ms=5&enable.idempotence=false"
    with (
        open_bus(url, identity="cook", topics=kitchen) as bus,
        bus.subscribe(["Kitchen.sink"]) as subscription,
    ):
        yield bus, subscription


@given(VALUES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_value_comes_back_as_it_was(kitchen_bus, values):
    bus, subscription = kitchen_bus
    bus.publish("Kitchen.sink", values)
    [message] = subscription.poll(10.0)
    for name, value in values.items():
        assert same(message.fields[name], value), name
    missing = {"truth": False, "small": 0, "large": 0, "single": math.nan, "twice": 1.5, "words": "", "raw": b"",
               "twices": [], "names": [], "blobs": []}  # fmt: skip
    for name in missing.keys() - values.keys():
        assert same(message.fields[name], missing[name]), name


def test_numpy_paths_and_none_are_accepted(kitchen):
    given_values = {
        "truth": np.bool_(True), "small": np.int16(5), "large": 7.0, "single": np.float32(0.1), "twice": None,
        "words": Path("/a/b"), "twices": np.array([1.0, 2.0]), "raw": bytearray(b"x"), "names": ("a", None),
    }  # fmt: skip
    done = kitchen["Kitchen.sink"].complete(given_values)
    assert done == {
        "truth": True, "small": 5, "large": 7, "single": float(np.float32(0.1)), "twice": 1.5, "words": "/a/b",
        "raw": b"x", "twices": [1.0, 2.0], "names": ["a", ""], "blobs": [],
    }  # fmt: skip
    assert type(done["small"]) is int
    assert type(done["truth"]) is bool


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("small", 2**31), ("small", 1.5), ("small", "1"), ("large", 2**63), ("large", math.nan), ("twice", "1"),
        ("twice", [1.0]), ("single", 1e300), ("words", 5), ("words", "\ud800"), ("raw", "x"), ("names", "abc"),
        ("twices", 1.0), ("truth", 2), ("truth", "yes"), ("twices", {"a": 1}),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_refused(kitchen, field, value):
    with pytest.raises(UserError, match=rf"Kitchen\.sink, field {field} = .*expected "):
        kitchen["Kitchen.sink"].complete({field: value})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("type: boolean", "type: bool"), "expected one of boolean, int"),
        (("kind: event", "kind: happening"), "kind"),
        (("default: 1.5", "default: many"), "is no double"),
        (("keep: all", "last_by: [nothing]"), "last_by: no field 'nothing'"),
        (("keep: all", "use: [image]"), "no block 'image'"),
        (("kind: event", "kind: [event"), "not a topic file"),
    ],
)
def test_a_wrong_topic_file_is_named(tmp_path, change, reason):
    (tmp_path / "Kitchen.yaml").write_text(KITCHEN.replace(*change))
    with pytest.raises(ConfigurationError, match=r"Kitchen\.yaml(.|\n)*" + reason.replace("[", r"\[")):
        load_topics(tmp_path)


def test_own_topics_are_complete_and_described():
    topics = default_topics()
    assert topics["Camera.takeImages"].kind == "command"
    assert topics["Camera.ackcmd"].kind == "ack"
    assert topics["Alerts.packet"].kind == "stream"
    assert "groupId" in topics["Camera.endReadout"].fields
    for topic in topics:
        assert topic.description, topic.name
        for name, field in topic.fields.items():
            assert field.description, f"{topic.name}.{name}"


def test_avro_schema_is_sals(kitchen):
    schema = avro.avro_schema(default_topics()["Camera.endReadout"])
    assert (schema["namespace"], schema["name"]) == ("lsst.sal.Camera", "logevent_endReadout")
    names = [field["name"] for field in schema["fields"]]
    assert names[:9] == [
        "salIndex", "private_sndStamp", "private_rcvStamp", "private_efdStamp", "private_kafkaStamp",
        "private_seqNum", "private_revCode", "private_identity", "private_origin",
    ]  # fmt: skip
    by_name = {field["name"]: field for field in schema["fields"]}
    assert by_name["timestampEndOfReadout"]["units"] == "s"
    assert by_name["detectors"]["type"] == {"type": "array", "items": "string"}
    for topic in [*default_topics(), *kitchen]:
        made = avro.avro_schema(topic)
        assert json.loads(avro.schema_text(made)) == made  # plain JSON: no NaN, no bytes
        fastavro.parse_schema(made, named_schemas={})
        assert all({"default", "description", "units"} <= field.keys() for field in made["fields"])
    assert avro.sal_name(default_topics()["Camera.takeImages"]) == "command_takeImages"
    assert avro.sal_name(default_topics()["Camera.ackcmd"]) == "ackcmd"
    assert avro.sal_name(default_topics()["Service.heartbeat"]) == "heartbeat"


class _Registry(BaseHTTPRequestHandler):
    """Two calls of the Confluent protocol, as its reference describes them."""

    schemas: list[str] = []  # noqa: RUF012

    def _answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        schema = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["schema"]
        if "refused" in self.path:
            self._answer({"error_code": 409, "message": "incompatible"}, 409)
            return
        if schema not in self.schemas:
            self.schemas.append(schema)
        self._answer({"id": 100 + self.schemas.index(schema)})

    def do_GET(self):
        number = int(self.path.rsplit("/", 1)[1]) - 100
        if 0 <= number < len(self.schemas):
            self._answer({"schema": self.schemas[number]})
        else:
            self._answer({"error_code": 40403, "message": "Schema not found"}, 404)

    def log_message(self, *args):
        pass


@pytest.fixture
def registry():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Registry)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_registry_gives_ids_and_schemas(registry, kitchen, mock_servers):
    url = f"kafka://{mock_servers}?prefix=reg&create=no&fetch.wait.max.ms=5&enable.idempotence=false&registry={registry}"
    with (
        open_bus(url, identity="a", topics=kitchen) as bus,
        open_bus(url, identity="b", topics=kitchen) as other,
    ):
        bus.publish("Kitchen.sink", {"words": "via the registry"})
        [message] = other.replay(["Kitchen.sink"])
        assert message.fields["words"] == "via the registry"
    with pytest.raises(FatalError, match=r"409 .*incompatible"):
        RegistrySchemas(registry).id_of("refused-value", {"type": "string"})
    with pytest.raises(TransientError, match="404"):
        RegistrySchemas(registry).schema_of(999)
    with pytest.raises(FatalError, match="expected http"):
        RegistrySchemas("file:///etc/passwd")


def test_a_message_that_is_not_avro_stops_nothing(kitchen, mock_servers, caplog):
    from confluent_kafka import Producer

    url = f"kafka://{mock_servers}?prefix=junk&create=no&fetch.wait.max.ms=5&enable.idempotence=false"
    with (
        open_bus(url, identity="a", topics=kitchen) as bus,
        bus.subscribe(["Kitchen.sink"], "now") as subscription,
    ):
        bus.publish("Kitchen.sink", {"words": "before"})
        stranger = Producer({"bootstrap.servers": mock_servers})
        for junk in (b"hello", b"\x00\xff\xff\xff\xffxx", b""):
            stranger.produce("junk.Kitchen.logevent_sink", junk, partition=0)
        assert stranger.flush(10) == 0
        bus.publish("Kitchen.sink", {"words": "after"})
        got = []
        while len(got) < 2:
            got += subscription.poll(5.0)
        assert [m.fields["words"] for m in got] == ["before", "after"]
        assert bus.unknown_fields["Kitchen.sink", ""] == 3
    assert "skipped" in caplog.text


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://relative/bus.db",
        "redis://host",
        "kafka://h:1?colour=red",
        "kafka://h:1?create=maybe",
        "/a/bus.db",
    ],
)
def test_a_wrong_address_is_refused(url):
    with pytest.raises(ConfigurationError, match=r"^bus .*expected"):
        open_bus(url, identity="x")
