"""One contract for all buses: what the rest of the house may count on."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cumbre.bus import AckCode, load_topics
from cumbre.core.errors import DeadlineError, FatalError, NotFoundError, UserError
from cumbre.core.time import utc_from_tai

NIGHT_TAI = 1_795_230_000.0  # as in conftest

pytestmark = pytest.mark.timeout(60)
WAIT_S = 10.0


def collect(subscription, count, wait_s=WAIT_S):
    """Poll until ``count`` messages came (or time is over)."""
    got, deadline = [], time.monotonic() + wait_s
    while len(got) < count and time.monotonic() < deadline:
        got += subscription.poll(0.2)
    return got


def test_message_carries_what_was_sent_and_stamps(place):
    bus = place("writer")
    subscription = bus.subscribe(["Image.hop"], start="now")
    bus.publish("Image.hop", {"obsId": "XC_O_20261120_000001", "hop": "written", "byteSize": 2**40}, index=3)
    [message] = collect(subscription, 1)
    assert (message.topic, message.kind, message.index) == ("Image.hop", "event", 3)
    assert message.fields["obsId"] == "XC_O_20261120_000001"
    assert message.fields["byteSize"] == 2**40
    assert message.fields["detector"] == -1  # the topic file's default
    assert message.fields["hopTai"] != message.fields["hopTai"]  # a missing double is NaN
    assert 0 <= message.snd_tai - NIGHT_TAI < 60
    assert message.snd_utc == pytest.approx(utc_from_tai(message.snd_tai), abs=1e-6)
    assert message.snd_tai - message.snd_utc == pytest.approx(37.0)
    assert (message.identity, message.origin) == ("writer", os.getpid())
    assert message.seq_num >= 1


def test_order_within_a_topic(place):
    bus, other = place("a"), place("b")
    subscription = bus.subscribe(["Image.hop", "Service.heartbeat"], start="now")
    for number in range(60):
        (bus, other)[number % 2].publish("Image.hop", {"exposureId": number})
        bus.publish("Service.heartbeat", {"pid": number})
    got = collect(subscription, 120)
    for topic, field in (("Image.hop", "exposureId"), ("Service.heartbeat", "pid")):
        mine = [m for m in got if m.topic == topic]
        assert [m.fields[field] for m in mine] == list(range(60))
        assert [m.offset for m in mine] == sorted({m.offset for m in mine})


def test_what_is_wanted_of_a_topic_comes_whatever_else_there_is(place):
    bus = place("a")
    topics, wanted = ["Image.hop", "Control.job"], {"Image.hop": {"hop": "written", "place": "summit"}}

    def hops(messages):
        told = [m.fields for m in messages if m.topic == "Image.hop"]
        return [one["exposureId"] for one in told if (one["hop"], one["place"]) == ("written", "summit")]

    with place("b").subscribe(topics, start="earliest", consumer="c", only=wanted) as reader:
        for number in range(30):
            hop, said = ("written", "so") if number % 3 else ("sent", '"hop":"written","place":"summit"')
            where = "summit" if number % 2 else "summit2"
            fields = {"hop": hop, "place": where, "message": said, "exposureId": number}
            bus.publish("Image.hop", fields)
        bus.publish("Control.job", {"jobId": "hop"})
        got = []
        while len(hops(got)) < 10 or all(m.topic == "Image.hop" for m in got):
            got += reader.poll(WAIT_S, limit=7)
        reader.commit()
    assert hops(got) == [n for n in range(30) if n % 3 and n % 2]
    if type(bus).__name__ == "SqliteBus":
        assert len(got) == 11  # the others were not even read
    bus.publish("Image.hop", {"hop": "written", "place": "summit", "exposureId": 99})
    with place("b").subscribe(topics, consumer="c", only=wanted) as reader:
        assert hops(reader.poll(WAIT_S)) == [99]


def test_late_joiner_gets_the_last_value_of_each_event_and_index(place):
    bus = place()
    for number in range(5):
        bus.publish("Camera.startIntegration", {"imageNumber": number}, index=number % 2)
    late = place("late")
    subscription = late.subscribe(["Camera.startIntegration"], start="latest")
    bus.publish("Camera.startIntegration", {"imageNumber": 5}, index=1)
    assert [m.fields["imageNumber"] for m in collect(subscription, 3)] == [3, 4, 5]
    assert late.latest("Camera.startIntegration").fields["imageNumber"] == 4
    assert late.latest("Camera.startIntegration", index=1).fields["imageNumber"] == 5
    assert late.latest("Camera.startIntegration", index=7) is None


def test_last_value_by_field(place):
    bus = place()
    for name, state in (("writer", 5), ("ledger", 5), ("writer", 2)):
        bus.publish("Service.summaryState", {"name": name, "summaryState": state})
    got = collect(place("late").subscribe(["Service.summaryState"]), 2)
    assert {m.fields["name"]: m.fields["summaryState"] for m in got} == {"ledger": 5, "writer": 2}
    assert bus.latest("Service.summaryState", key="ledger").fields["summaryState"] == 5
    assert bus.latest("Service.summaryState").fields["name"] == "writer"
    assert [m.fields["name"] for m in bus.latest_all("Service.summaryState")] == ["ledger", "writer"]


def test_no_history_of_commands_and_telemetry(place):
    bus = place()
    for topic in ("Camera.takeImages", "Service.heartbeat"):
        bus.publish(topic, {})
    late = place("late").subscribe(["Camera.takeImages", "Service.heartbeat"], start="latest")
    bus.publish("Service.heartbeat", {"pid": 7})
    assert [m.fields["pid"] for m in collect(late, 1)] == [7]
    for topic in ("Camera.takeImages", "Service.heartbeat"):
        with pytest.raises(UserError, match="only events have a last value"):
            bus.latest(topic)


def test_replay_reads_everything_from_an_offset_and_between_times(place):
    bus = place()
    for number in range(10):
        bus.publish("Service.heartbeat", {"pid": number})
    everything = list(bus.replay(["Service.heartbeat"]))
    assert [m.fields["pid"] for m in everything] == list(range(10))
    assert [m.fields["pid"] for m in bus.replay(["Service.heartbeat"], everything[4].offset)] == [
        4,
        5,
        6,
        7,
        8,
        9,
    ]
    between = bus.replay(None, None, everything[2].snd_tai, everything[5].snd_tai)
    assert [m.fields["pid"] for m in between] == [2, 3, 4]
    subscription = place("late").subscribe(["Service.heartbeat"], start=everything[7].offset)
    assert [m.fields["pid"] for m in collect(subscription, 3)] == [7, 8, 9]
    assert len(collect(place("early").subscribe(["Service.heartbeat"], start="earliest"), 10)) == 10


def test_named_consumer_resumes_after_what_it_committed(place):
    bus = place("writer")
    first = place("ledger").subscribe(["Image.hop"], start="now", consumer="ledger")
    for number in range(6):
        bus.publish("Image.hop", {"exposureId": number})
    got = collect(first, 6)
    first.commit(got[2])
    first.close()  # as if it had died: 3, 4, 5 were returned, never committed
    bus.publish("Image.hop", {"exposureId": 6})
    second = place("ledger").subscribe(["Image.hop"], start="now", consumer="ledger")
    assert [m.fields["exposureId"] for m in collect(second, 4)] == [3, 4, 5, 6]
    second.commit()
    second.close()
    third = place("ledger").subscribe(["Image.hop"], start="earliest", consumer="ledger")
    assert third.poll(0.3) == []


@pytest.mark.parametrize("start", ["now", "latest", "earliest"])
def test_named_consumer_that_died_before_its_first_commit_misses_nothing(place, start):
    bus = place("writer")
    bus.publish("Image.hop", {"exposureId": 0})
    bus.publish("Image.hop", {"exposureId": 1})
    place("x").subscribe(["Image.hop"], start=start, consumer="ledger").close()
    bus.publish("Image.hop", {"exposureId": 2})
    again = place("x").subscribe(["Image.hop"], start=start, consumer="ledger")
    wanted = {"now": [2], "latest": [1, 2], "earliest": [0, 1, 2]}[start]
    assert [m.fields["exposureId"] for m in collect(again, len(wanted))] == wanted
    again.commit()
    again.close()
    bus.publish("Image.hop", {"exposureId": 3})
    third = place("x").subscribe(["Image.hop"], start=start, consumer="ledger")
    assert [m.fields["exposureId"] for m in collect(third, 1)] == [3]


def test_topic_added_to_a_named_consumer_takes_nothing_from_the_others(place):
    bus = place("writer")
    place("x").subscribe(["Image.hop"], start="now", consumer="ledger").close()
    bus.publish("Image.hop", {"exposureId": 1})
    bus.publish("Camera.endReadout", {"imageNumber": 9})
    wider = place("x").subscribe(["Image.hop", "Camera.endReadout"], start="latest", consumer="ledger")
    [value] = collect(wider, 1)  # the last value comes first
    assert value.topic == "Camera.endReadout"
    wider.commit(value)
    wider.close()
    again = place("x").subscribe(["Image.hop", "Camera.endReadout"], start="latest", consumer="ledger")
    assert [m.fields["exposureId"] for m in collect(again, 1)] == [1]


_WRITER = """
import sys
from cumbre.bus import open_bus
bus = open_bus(sys.argv[1], identity="victim")
number = 0
while True:
    bus.publish("Image.hop", {"exposureId": number})
    print(number, flush=True)
    number += 1
"""


def test_kill_of_a_writer_loses_nothing_acknowledged(place):
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITER, place.url], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    acknowledged = [int(process.stdout.readline()) for _ in range(200)]
    os.kill(process.pid, signal.SIGKILL)
    acknowledged += [int(line) for line in process.stdout.read().split(b"\n") if line]
    process.stdout.close()
    assert process.wait(10) == -signal.SIGKILL
    stored = [m.fields["exposureId"] for m in place().replay(["Image.hop"])]
    assert len(acknowledged) >= 200
    assert stored[: len(acknowledged)] == acknowledged
    assert len(stored) - len(acknowledged) in (0, 1)  # one may be stored whose answer nobody lived to hear


_READER = """
import sys
from cumbre.bus import open_bus
bus = open_bus(sys.argv[1], identity="reader")
subscription = bus.subscribe(["Image.hop"], start="earliest", consumer="slow")
assert subscription.poll(20, limit=1)
print("reading", flush=True)
while True:
    subscription.poll(1)
"""


def test_stopped_and_silent_consumers_do_not_block_writers(place):
    bus = place("writer")
    bus.publish("Image.hop", {"exposureId": 0})
    silent = bus.subscribe(["Image.hop"], start="earliest")
    half_read = bus.replay(["Image.hop"])
    next(half_read)
    process = subprocess.Popen([sys.executable, "-c", _READER, place.url], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"reading\n"
        os.kill(process.pid, signal.SIGSTOP)
        begun = time.monotonic()
        for number in range(1, 150):
            bus.publish("Image.hop", {"exposureId": number})
        assert time.monotonic() - begun < 15.0
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
        process.stdout.close()
    assert [m.fields["exposureId"] for m in collect(silent, 150)] == list(range(150))


def _newer_catalog(folder: Path, extra: str):
    (folder / "Image.yaml").write_text(
        "component: Image\ndescription: d\nindexed: true\ntopics:\n  hop:\n    kind: event\n    keep: all\n"
        "    description: d\n    fields:\n      obsId: {type: string, description: d}\n" + extra
    )
    return load_topics(folder)


def test_unknown_fields_of_a_newer_sender_are_ignored_and_reported(place, tmp_path, caplog):
    newer = _newer_catalog(tmp_path, "      colour: {type: string, description: not known here}\n")
    subscription = (bus := place("old")).subscribe(["Image.hop"], start="now")
    writer = place("new", topics=newer)
    for _ in range(2):
        writer.publish("Image.hop", {"obsId": "XC_O_20261120_000001", "colour": "red"})
    got = collect(subscription, 2)
    assert [m.fields["obsId"] for m in got] == ["XC_O_20261120_000001"] * 2
    assert "colour" not in got[0].fields
    assert got[0].fields["attempt"] == 1  # a field the sender does not know gets its default
    assert bus.unknown_fields == {("Image.hop", "colour"): 2}
    assert caplog.text.count("unknown field 'colour'") == 1


def test_bad_publish_names_topic_and_field(place):
    bus = place()
    with pytest.raises(UserError, match=r"Image\.hop has no field 'obsID'; did you mean 'obsId'"):
        bus.publish("Image.hop", {"obsID": "x"})
    with pytest.raises(UserError, match=r"Image\.hop, field exposureId = 'x': expected long"):
        bus.publish("Image.hop", {"exposureId": "x"})
    with pytest.raises(NotFoundError, match=r"no topic 'Image\.hob'; did you mean Image\.hop"):
        bus.publish("Image.hob", {})
    with pytest.raises(UserError, match="use publish_bytes"):
        bus.publish("Alerts.packet", {})
    with pytest.raises(UserError, match="not stream"):
        bus.publish_bytes("Image.hop", b"x")
    with pytest.raises(UserError, match="start = 'yesterday'"):
        bus.subscribe(["Image.hop"], start="yesterday")


def test_command_and_answer(place):
    operator, camera = place("operator"), place("camera")
    commands = camera.subscribe(["Camera.takeImages"], start="now")

    def serve():
        for command in collect(commands, 1):
            camera.acknowledge(command, AckCode.IN_PROGRESS, timeout_s=5.0)
            code = AckCode.COMPLETE if command.fields["numImages"] == 2 else AckCode.FAILED
            camera.acknowledge(command, code, result=command.fields["note"], error=4)

    thread = threading.Thread(target=serve)
    thread.start()
    ack = operator.command("Camera.takeImages", {"numImages": 2, "note": "Done"}, timeout_s=WAIT_S)
    thread.join()
    assert (ack.ok, ack.code, ack.result, ack.error) == (True, AckCode.COMPLETE, "Done", 4)


def test_command_without_answer_ends_in_time(place):
    bus = place()
    begun = time.monotonic()
    with pytest.raises(DeadlineError, match=r"Camera\.takeImages.*no final answer within 0\.3 s"):
        bus.command("Camera.takeImages", {}, timeout_s=0.3)
    assert time.monotonic() - begun < 20.0
    with pytest.raises(UserError, match="not command"):
        bus.command("Image.hop", {}, timeout_s=0.3)


def test_stream_bytes_come_as_they_were(place):
    bus = place("alerts")
    subscription = bus.subscribe(["Alerts.packet"], start="latest", consumer="broker")
    packets = [b"\x00\x00\x00\x00\x01" + bytes([n]) * 1000 for n in range(20)]
    for number, packet in enumerate(packets):
        bus.publish_bytes("Alerts.packet", packet, key=str(number))
    got = collect(subscription, 20)
    assert [m.payload for m in got] == packets
    assert [m.key for m in got] == [str(n) for n in range(20)]
    assert (got[0].kind, got[0].identity, got[0].fields) == ("stream", "alerts", {})
    assert [m.payload for m in bus.replay(["Alerts.packet"])] == packets


def test_poll_limit_and_waiting(place):
    bus = place()
    subscription = bus.subscribe(["Image.hop"], start="now")
    assert subscription.poll(0.0) == []
    bus.publish_many([("Image.hop", {"exposureId": n}) for n in range(25)])
    got = []
    while len(got) < 25:
        page = subscription.poll(5.0, limit=10)
        assert 0 < len(page) <= 10
        got += page
    assert [m.fields["exposureId"] for m in got] == list(range(25))
    begun = time.monotonic()
    assert subscription.poll(0.1) == []
    assert 0.09 < time.monotonic() - begun < 20.0


def test_one_bus_in_several_threads(place):
    bus = place()
    subscription = bus.subscribe(["Image.hop"], start="now")

    def write(detector):
        for number in range(25):
            bus.publish("Image.hop", {"detector": detector, "exposureId": number})

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    got = collect(subscription, 100)
    for thread in threads:
        thread.join()
    for detector in range(4):
        assert [m.fields["exposureId"] for m in got if m.fields["detector"] == detector] == list(range(25))
    assert len({m.seq_num for m in got}) == 100


def test_prune_forgets_telemetry_only(place):
    if "create=no" in place.url:
        pytest.skip("librdkafka's mock cluster has no DeleteRecords")
    bus = place()
    for _ in range(3):
        bus.publish("Service.heartbeat", {"pid": 1})
    bus.publish("Image.hop", {"obsId": "x"})
    bus.publish_bytes("Alerts.packet", b"x")
    assert bus.prune(NIGHT_TAI + 3600) == 3
    assert [m.topic for m in bus.replay(["Service.heartbeat", "Image.hop"])] == ["Image.hop"]
    assert len(list(bus.replay(["Alerts.packet"]))) == 1
    assert bus.prune(NIGHT_TAI + 3600) == 0


_OPENER = """
import sys
from cumbre.bus import open_bus
sys.stdin.readline()
bus = open_bus(sys.argv[1], identity=sys.argv[2])
for number in range(20):
    bus.publish("Image.hop", {"exposureId": number})
"""


def test_processes_that_open_a_new_bus_at_once(place):
    processes = [
        subprocess.Popen([sys.executable, "-c", _OPENER, place.url, f"p{n}"], stdin=subprocess.PIPE)
        for n in range(4)
    ]
    for process in processes:
        process.stdin.write(b"\n")
        process.stdin.flush()
    for process in processes:
        process.stdin.close()
        assert process.wait(30) == 0
    stored = list(place().replay(["Image.hop"]))
    for number in range(4):
        mine = [m.fields["exposureId"] for m in stored if m.identity == f"p{number}"]
        assert mine == list(range(20))


def test_use_after_close_says_so(place):
    bus = place()
    bus.publish("Image.hop", {})
    bus.close()
    with pytest.raises(FatalError, match="after close"):
        bus.publish("Image.hop", {})
