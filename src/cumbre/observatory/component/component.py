"""The bus face of a commandable component: commands in, answers and states out, everything stored first.

The order of each command is: decide (pure), store state and answer in one transaction, publish. A process that
dies between the last two publishes at its next start, and the command, given again by the bus, is answered with
what was stored.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import cumbre
from cumbre.bus import AckCode, Bus, Message
from cumbre.core.errors import UserError
from cumbre.core.time import Clock
from cumbre.observatory.component import machine, storage
from cumbre.observatory.component.authority import Authority
from cumbre.observatory.component.configuration import Configuration
from cumbre.observatory.component.machine import VERBS, Decision, State
from cumbre.observatory.component.storage import Saved, Transaction

log = logging.getLogger(__name__)

MAX_AGE_S = 30.0
"""Real seconds after which a command is refused: its sender has given up, and the world has moved on."""
HEARTBEAT_S = 1.0
_CODES = {"complete": AckCode.COMPLETE, "in progress": AckCode.IN_PROGRESS, "failed": AckCode.FAILED}


class Component:
    """Base of commandable components; used by one thread.

    Parameters
    ----------
    name
        Component of the topic files (``Archiver``).
    transaction
        Opens a transaction on the control database; fenced where several processes may act for the component.
    authority
        Who may command.
    epoch
        Gives the epoch to publish; 0 where there is no lease.
    locked
        Gives why engineering has locked control out; "" when it has not.
    software_hash
        sha256:hex of the installed software.
    """

    def __init__(
        self,
        name: str,
        *,
        bus: Bus,
        clock: Clock,
        transaction: Transaction,
        authority: Authority,
        epoch: Callable[[], int] = lambda: 0,
        locked: Callable[[], str] = lambda: "",
        software_hash: str = "",
    ) -> None:
        self.name, self.bus, self.clock = name, bus, clock
        self._transaction, self._authority = transaction, authority
        self._epoch, self._locked, self._software_hash = epoch, locked, software_hash
        self._saved = Saved()
        self._command: Message | None = None
        self._configuration: Configuration | None = None
        self._deadline = 0.0
        self._told: dict[str, Any] = {}
        self._next_beat = 0.0
        self.level = logging.INFO
        self._logger = log.getChild(name)

    # what a component brings

    def configurations(self) -> Sequence[str]:
        """Names that configure accepts."""
        return ()

    def configuration(self, name: str) -> Configuration:
        """Read and check one configuration.

        Raises
        ------
        UserError
            It is not legal; the reason is the command's answer.
        """
        raise UserError(f"configuration {name!r}: {self.name} has none")

    def unmet(self, configuration: Configuration) -> str:
        """Say which prerequisite is missing now; "" for none."""
        del configuration
        return ""

    def jobs_in_flight(self) -> int:
        """Jobs submitted and not ended."""
        return 0

    def changed(self, before: State, after: State) -> None:
        """Follow a change of state that is stored already; also called once with the state found at a start."""

    # state

    @property
    def state(self) -> State:
        """The three axes."""
        return self._saved.state

    @property
    def settings(self) -> Mapping[str, Any]:
        """Parameters of the configuration in force."""
        return dict(json.loads(self._saved.settings))

    @property
    def enabled_tai(self) -> float:
        """Since when it is enabled; events sent before are not its business."""
        return self._saved.enabled_tai

    @property
    def topics(self) -> list[str]:
        """Its commands, to be subscribed to."""
        return [f"{self.name}.{verb}" for verb in VERBS]

    def recover(self, *, cold: bool) -> None:
        """Begin: OFFLINE after a cold boot, else go on from what is stored."""
        with self._transaction() as link:
            saved = storage.load_state(link, self.name) or Saved()
            command = storage.open_command(link, [f"{self.name}.configure", f"{self.name}.start"])
            if cold:
                state = machine.command(saved.state, "release", jobs=self.jobs_in_flight()).state
                saved = Saved(state)
                storage.save_state(
                    link, self.name, saved, epoch=self._epoch(), now_tai=self.clock.now_tai_s()
                )
                if command is not None:
                    self._record(link, command, AckCode.ABORTED, "control was started anew")
        self._saved, self._told = saved, {}
        self._configuration, self._command = None, None
        if cold and command is not None:
            self._answer(command, AckCode.ABORTED, "control was started anew")
        if not cold and saved.state.configuring:
            self._command = command
            self._deadline = 0.0
        self.changed(State(), saved.state)
        self.publish_state()

    # commands

    def handle(self, message: Message) -> None:
        """Do one command and answer it."""
        verb = message.topic.partition(".")[2]
        with self._transaction() as link:
            known = storage.answered(link, message)
        if known is not None and known.is_final:
            self.bus.acknowledge(message, known.ack, known.result)
            return
        if known is not None and self._command is not None and _same(self._command, message):
            return  # its configure runs
        age_s = self.clock.wall_s(self.clock.now_tai_s() - message.snd_tai)
        if not self._authority.may(self.name, verb, message.identity):
            allowed = ", ".join(self._authority.allowed(self.name, verb)) or "nobody"
            self._refuse(message, AckCode.NO_PERMISSION, f"{message.identity} may not; allowed: {allowed}")
        elif age_s > MAX_AGE_S:
            self._refuse(message, AckCode.FAILED, f"sent {age_s:.0f} s ago; send it again if it still holds")
        else:
            argument = str(
                message.fields.get("configuration") or message.fields.get("configurationOverride") or ""
            )
            decision = machine.command(
                self.state, verb, argument=argument, locked=self._locked(), jobs=self.jobs_in_flight()
            )
            self._follow(message, verb, decision)

    def _refuse(self, message: Message, ack: AckCode, reason: str) -> None:
        with self._transaction() as link:
            self._record(link, message, ack, reason)
        self._logger.warning("%s from %s refused: %s", message.topic, message.identity, reason)
        self._answer(message, ack, reason)

    def _follow(self, message: Message, verb: str, decision: Decision) -> None:
        before, code = self.state, _CODES[decision.answer]
        saved = self._next_saved(before, decision.state)
        ended = self._command if decision.cancels else None
        with self._transaction() as link:
            if ended is not None:
                self._record(link, ended, AckCode.ABORTED, f"ended by {verb}")
            self._record(link, message, code, decision.result)
            if saved != self._saved:
                storage.save_state(
                    link, self.name, saved, epoch=self._epoch(), now_tai=self.clock.now_tai_s()
                )
        self._saved = saved
        self._logger.info(
            "%s from %s: %s, %s", message.topic, message.identity, decision.answer, decision.result
        )
        if decision.cancels:
            self._command = self._configuration = None
        if decision.answer == "in progress":
            self._command, self._configuration, self._deadline = message, None, 0.0
        if before != self.state:
            self.changed(before, self.state)
        self.publish_state()
        if ended is not None:
            self._answer(ended, AckCode.ABORTED, f"ended by {verb}")
        if verb == "setLogLevel" and code is AckCode.COMPLETE:
            self._set_log_level(message)
        if code is not AckCode.IN_PROGRESS:
            self._answer(message, code, decision.result)

    def _next_saved(self, before: State, after: State) -> Saved:
        saved = replace(self._saved, state=after)
        if after.is_enabled and not before.is_enabled:
            saved = replace(saved, enabled_tai=self.clock.now_tai_s())
        if not after.configuration:
            saved = replace(saved, version="", hash="", settings="{}")
        return saved

    def _set_log_level(self, message: Message) -> None:
        self.level = int(message.fields["level"])
        name = message.fields["subsystem"] or __name__.rpartition(".")[0]
        logging.getLogger(name).setLevel(self.level)
        self.publish("logLevel", {"level": self.level, "subsystem": message.fields["subsystem"]})

    # the configure that runs, the end of jobs, the heartbeat

    def advance(self) -> int:
        """Bring a running configure on, notice the end of draining, send the heartbeat; gives what changed."""
        done = 0
        if self.state.configuring:
            done += self._check_configuration()
        if self.state.processing is machine.Processing.DRAINING and not self.jobs_in_flight():
            self._store(replace(self._saved, state=machine.drained(self.state)))
            done += 1
        if time.monotonic() >= self._next_beat:
            self._next_beat = time.monotonic() + HEARTBEAT_S
            self.publish("heartbeat", {"jobsInFlight": self.jobs_in_flight()})
        return done

    def _check_configuration(self) -> int:
        name = self.state.configuring
        if self._configuration is None:
            try:
                self._configuration = self.configuration(name)
            except UserError as error:
                return self._end_configure(None, str(error))
            self._deadline = time.monotonic() + self._configuration.wait_s
            if self._command is not None:
                wait_s = self._configuration.wait_s + 2.0
                self.bus.acknowledge(self._command, AckCode.IN_PROGRESS, f"checking {name}", timeout_s=wait_s)
        missing = self.unmet(self._configuration)
        if missing and time.monotonic() < self._deadline:
            return 0
        return self._end_configure(
            None if missing else self._configuration, f"configuration {name!r}: {missing}"
        )

    def _end_configure(self, good: Configuration | None, reason: str) -> int:
        if good is None:
            saved = replace(self._saved, state=machine.configure_failed(self.state))
            code = AckCode.FAILED
        else:
            state = machine.configured(self.state, jobs=self.jobs_in_flight())
            saved = Saved(state, good.version, good.hash, good.settings_json, 0.0)
            code, reason = AckCode.COMPLETE, f"configuration {good.name}, version {good.version}"
        command, self._command, self._configuration = self._command, None, None
        self._store(saved, command, code, reason)
        if good is not None:
            told = {
                "configurations": good.name, "version": good.version, "hash": good.hash, "url": good.url,
                "schemaVersion": "1", "otherInfo": good.settings_json,
            }  # fmt: skip
            self.publish("configurationApplied", told)
        if command is not None:
            self._answer(command, code, reason)
        return 1

    def _store(
        self, saved: Saved, command: Message | None = None, ack: AckCode = AckCode.COMPLETE, result: str = ""
    ) -> None:
        before = self.state
        with self._transaction() as link:
            storage.save_state(link, self.name, saved, epoch=self._epoch(), now_tai=self.clock.now_tai_s())
            if command is not None:
                self._record(link, command, ack, result)
        self._saved = saved
        self.changed(before, saved.state)
        self.publish_state()

    def fault(self, report: str, traceback: str = "") -> None:
        """Go to ERROR (FAULT) for an internal reason: processing ends, jobs that run do not."""
        state = machine.fault(self.state, report, jobs=self.jobs_in_flight())
        if state == self.state:
            return
        command, self._command, self._configuration = self._command, None, None
        self._store(replace(self._saved, state=state), command, AckCode.FAILED, report)
        self.publish("errorCode", {"errorCode": machine.FAULT, "errorReport": report, "traceback": traceback})
        self.tell(logging.ERROR, report, traceback)
        if command is not None:
            self._answer(command, AckCode.FAILED, report)

    # out

    def publish(self, topic: str, fields: Mapping[str, Any]) -> None:
        """Publish one of the component's own topics with the epoch."""
        self.bus.publish(f"{self.name}.{topic}", {**fields, "epoch": self._epoch()})

    def tell(self, level: int, message: str, traceback: str = "") -> None:
        """Say something on the component's log, when its level wants it."""
        if level >= self.level:
            self.publish("logMessage", {"level": level, "message": message, "traceback": traceback})

    def publish_state(self, *, force: bool = False) -> None:
        """Publish the states that differ from what was published last; all of them when forced."""
        if force:
            self._told = {}
        state, saved = self.state, self._saved
        detailed = {
            "protocolState": state.ldm, "configurationName": state.configuration,
            "configurationVersion": saved.version, "configurationHash": saved.hash,
            "processing": str(state.processing),
            "commandInProgress": f"configure {state.configuring}" if state.configuring else "",
            "settings": saved.settings,
        }  # fmt: skip
        available = {
            "overrides": list(self.configurations()), "version": cumbre.__version__, "schemaVersion": "1",
        }  # fmt: skip
        events: dict[str, dict[str, Any]] = {
            "errorCode": {"errorCode": state.error_code, "errorReport": state.error_report},
            "detailedState": detailed,
            "summaryState": {"summaryState": int(state.summary)},
            "softwareVersions": {"cscVersion": cumbre.__version__, "hash": self._software_hash},
            "configurationsAvailable": available,
        }
        news = {topic: fields for topic, fields in events.items() if self._told.get(topic) != fields}
        if "detailedState" in news:
            news["detailedState"] = {**detailed, "jobsInFlight": self.jobs_in_flight()}
        if news:
            epoch = {"epoch": self._epoch()}
            self.bus.publish_many(
                [(f"{self.name}.{topic}", fields | epoch) for topic, fields in news.items()]
            )
        self._told = events

    def _record(self, link: Any, message: Message, ack: AckCode, result: str) -> None:
        storage.record(link, message, ack, result, epoch=self._epoch(), now_tai=self.clock.now_tai_s())

    def _answer(self, message: Message, ack: AckCode, result: str) -> None:
        error = 0 if ack is AckCode.COMPLETE else 1
        self.bus.acknowledge(message, ack, result, error=error)
        self.publish(
            "commandRecorded",
            {
                "command": message.topic.partition(".")[2], "argument": json.dumps(message.fields),
                "commander": message.identity, "origin": message.origin, "seqNum": message.seq_num,
                "ack": int(ack), "result": result,
            },
        )  # fmt: skip


def _same(one: Message, other: Message) -> bool:
    return (one.topic, one.identity, one.origin, one.seq_num) == (
        other.topic, other.identity, other.origin, other.seq_num,
    )  # fmt: skip
