"""``cumbre command`` against a control system: answers, exit codes, states."""

from __future__ import annotations

import json
import threading
import time

import pytest
import yaml
from click.testing import CliRunner

from cumbre.bus import open_bus
from cumbre.cli.command import command
from cumbre.core.configuration import Site
from cumbre.core.errors import NotFoundError, UserError
from cumbre.observatory.control.system import ControlSystem
from support.control import make_site


@pytest.fixture
def site(tmp_path, database):
    commanders = {"*": ["*@*"], "CatchUpArchiver": ["nobody"]}
    config = make_site(tmp_path, control={"commanders": commanders}).config.model_dump(mode="json")
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(config | {"database": database.dsn}))
    site = Site.load(tmp_path)
    bus = open_bus(f"sqlite:///{tmp_path}/bus/bus.db", identity="control-base")
    system = ControlSystem(site=site, bus=bus, clock=bus.clock, db=database)
    stop = threading.Event()

    def serve():
        while not stop.is_set():
            system.step(0.1)
        system.close()

    thread = threading.Thread(target=serve)
    thread.start()
    bus.publish(
        "Replicator.registration",
        {"name": "replicator-1", "link": "summit-base", "pair": 1, "pool": "fully-operational"},
    )
    while bus.latest("Archiver.summaryState") is None:
        time.sleep(0.02)
    yield tmp_path
    stop.set()
    thread.join()


def run(site, *words):
    result = CliRunner().invoke(command, [*words, "--site", str(site)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_night_of_commands(site):
    assert run(site, "Archiver", "init").exit_code == 0
    wrong = run(site, "Archiver", "configure", "--mode", "nonsense")
    assert wrong.exit_code == 1
    assert "not one of daytime" in wrong.output
    good = run(site, "Archiver", "configure", "--mode", "science", "--json")
    assert json.loads(good.output)["ack"] == "COMPLETE"
    assert run(site, "Archiver", "enable").exit_code == 0
    state = json.loads(run(site, "Archiver", "--json").output)
    assert (state["state"], state["mode"], state["protocol"]) == ("ENABLED", "science", "IDLE")
    assert "engineering" in state["modes"]
    assert "STANDBY" not in run(site, "all").output
    assert run(site, "CatchUpArchiver", "init").exit_code == 4
    assert run(site, "Control", "lockOut", "--reason", "tests").exit_code == 0
    assert json.loads(run(site, "Control", "--json").output)["locked_out"]
    assert run(site, "EfdReplicator", "init").exit_code == 1
    assert run(site, "Control", "allow").exit_code == 0
    assert run(site, "EfdReplicator", "start", "--mode", "science").exit_code == 1


def test_what_is_no_command(site):
    with pytest.raises(NotFoundError, match="no entity 'Archivist'"):
        run(site, "Archivist", "init")
    with pytest.raises(NotFoundError, match="explode"):
        run(site, "Archiver", "explode")
    with pytest.raises(NotFoundError, match="no command 'detailedState'"):
        run(site, "Archiver", "detailedState")
    with pytest.raises(UserError, match="--mode is missing"):
        run(site, "Archiver", "configure")
    with pytest.raises(UserError, match="takes no --mode"):
        run(site, "Archiver", "enable", "--mode", "science")


def test_no_answer_is_an_exit_code_and_says_why(tmp_path):
    config = make_site(tmp_path).config.model_dump(mode="json")
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(config))
    result = run(tmp_path, "Archiver", "init", "--timeout", "0.2")
    assert result.exit_code == 5
    assert "no control system" in result.output
    assert "never heard of" in run(tmp_path, "all").output


def test_doctor_accepts_software(site, database):
    from cumbre.cli.doctor import doctor

    result = CliRunner().invoke(doctor, ["--accept-software", "--site", str(site), "--json"])
    assert "accepted: version" in result.output
    assert database.execute("SELECT count(*) FROM control.software")[0][0] >= 1
