"""``cumbre command``: command an entity and await its answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cumbre.cli.main import print_json
from cumbre.cli.up import site_option
from cumbre.core.configuration import Site
from cumbre.core.errors import DeadlineError, NotFoundError, UserError

if TYPE_CHECKING:
    from cumbre.bus import Bus

ENTITIES = ("Archiver", "CatchUpArchiver", "EfdReplicator", "AlertProductionCluster")
CONTROL = "Control"
FAILED, NO_PERMISSION, NO_ANSWER = 1, 4, 5


@click.command()
@click.argument("entity")
@click.argument("verb", default="state")
@site_option
@click.option("--mode", default="", help="Configuration, for configure and start.")
@click.option("--reason", default="", help="Why, for Control lockOut.")
@click.option("--level", type=int, help="Python logging level, for setLogLevel.")
@click.option("--timeout", "timeout_s", default=30.0, show_default=True, help="Real seconds to wait.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    entity: str, verb: str, folder: Path, mode: str, reason: str, level: int | None, timeout_s: float,
    as_json: bool,
) -> None:  # fmt: skip
    """Send a command to an ENTITY and wait for the answer; VERB `state` (the default) only shows its state.

    \b
    Entities: Archiver, CatchUpArchiver, EfdReplicator, AlertProductionCluster, all; and Control.
    Commands: init, configure, enable, disable, release, stop, abort, reset, and those of a CSC:
    enterControl, start, standby, exitControl, setLogLevel. Control has lockOut and allow.
    Exit code: 0 complete, 1 failed or aborted, 2 bad input, 3 no such entity or command,
    4 no permission, 5 no answer in time.

    \b
    Examples:
      cumbre command all --site ./site
      cumbre command Archiver init --site ./site
      cumbre command Archiver configure --mode science --site ./site
      cumbre command Control lockOut --reason "new software" --site ./site
    """
    from cumbre.observatory.component.client import person
    from cumbre.site.roles import open_site_bus

    site = Site.load(folder)
    bus = open_site_bus(site, person())
    names = ENTITIES if entity == "all" else (entity,)
    known = (*ENTITIES, CONTROL)
    for name in names:
        if name not in known:
            raise NotFoundError(f"no entity {name!r}; expected one of {', '.join(known)}, or all")
    if verb == "state":
        _show([_state(bus, name) for name in names], as_json)
        return
    fields = _fields(bus, names[0], verb, {"mode": mode, "reason": reason, "level": level})
    answers = [_send(bus, name, verb, fields, timeout_s) for name in names]
    if as_json:
        print_json(answers if entity == "all" else answers[0])
    else:
        for answer in answers:
            click.echo(f"{answer['entity']} {verb}: {answer['ack']}: {answer['result']}")
    worst = max(int(answer["exit_code"]) for answer in answers)
    if worst:
        raise click.exceptions.Exit(worst)


def _fields(bus: Bus, entity: str, verb: str, given: dict[str, Any]) -> dict[str, Any]:
    """Fields of the command's topic from the options; an option that the command does not have is refused."""
    topic = bus.topics[f"{entity}.{verb}"]
    if topic.kind != "command":
        raise NotFoundError(f"{entity} has no command {verb!r}")
    names = {"mode": ("configuration", "configurationOverride"), "reason": ("reason",), "level": ("level",)}
    fields = {}
    for option, value in given.items():
        field = next((name for name in names[option] if name in topic.fields), None)
        if value in ("", None):
            if option == "mode" and field is not None:
                raise UserError(f"{verb}: --mode is missing; see: cumbre command {entity} state")
            continue
        if field is None:
            raise UserError(f"{entity} {verb}: it takes no --{option}")
        fields[field] = value
    return fields


def _send(bus: Bus, entity: str, verb: str, fields: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    from cumbre.bus import AckCode
    from cumbre.observatory.component.client import RemoteComponent

    answer = {"entity": entity, "command": verb, **fields}
    try:
        ack = RemoteComponent(bus, entity).command_now(verb, timeout_s=timeout_s, **fields)
    except DeadlineError:
        last = bus.latest("Control.system", key="control-base")
        hint = "is the role control-base running?" if last else "this site has no control system"
        return answer | {
            "ack": "TIMEOUT", "code": int(AckCode.TIMEOUT), "exit_code": NO_ANSWER,
            "result": f"no answer within {timeout_s:g} s; {hint}",
        }  # fmt: skip
    codes = {AckCode.COMPLETE: 0, AckCode.NO_PERMISSION: NO_PERMISSION}
    return answer | {
        "ack": ack.code.name, "code": int(ack.code), "result": ack.result,
        "exit_code": codes.get(ack.code, FAILED),
    }  # fmt: skip


def _state(bus: Bus, entity: str) -> dict[str, Any]:
    from cumbre.observatory.component.client import RemoteComponent

    if entity == CONTROL:
        last = bus.latest("Control.system", key="control-base")
        if last is None:
            return {"entity": entity, "state": "never heard of"}
        fields = last.fields
        locked = bus.latest("Control.lockedOut")
        return {
            "entity": entity, "state": fields["state"], "holder": fields["holder"],
            "epoch": fields["epoch"], "self_test": json.loads(fields["selfTest"]),
            "locked_out": bool(locked and locked.fields["locked"]),
        }  # fmt: skip
    client = RemoteComponent(bus, entity)
    detailed, summary = client.detailed_state, client.summary_state
    if detailed is None or summary is None:
        return {"entity": entity, "state": "never heard of"}
    available = bus.latest(f"{entity}.configurationsAvailable")
    return {
        "entity": entity, "state": summary.name, "protocol": detailed["protocolState"],
        "mode": detailed["configurationName"], "processing": detailed["processing"],
        "command": detailed["commandInProgress"], "settings": json.loads(detailed["settings"] or "{}"),
        "modes": available.fields["overrides"] if available else [],
    }  # fmt: skip


def _show(states: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json(states if len(states) > 1 else states[0])
        return
    for state in states:
        words = [str(state["state"])]
        words += [
            f"{key} {state[key]}" for key in ("protocol", "mode", "processing", "holder") if state.get(key)
        ]
        click.echo(f"{state['entity']:<24} {', '.join(words)}")
