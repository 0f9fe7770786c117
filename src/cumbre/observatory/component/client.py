"""Commanding a component from a script, a notebook or another service."""

from __future__ import annotations

import asyncio
import getpass
import platform
import time
from typing import Any

from cumbre.bus import Ack, Bus, Message
from cumbre.core.errors import DeadlineError
from cumbre.observatory.component.machine import SummaryState

DEFAULT_TIMEOUT_S = 30.0


def person() -> str:
    """Identity of who runs this process: user@host, as SAL has it."""
    return f"{getpass.getuser()}@{platform.node() or 'localhost'}"


class RemoteComponent:
    """A component elsewhere on the bus.

    ``ack = await archiver.command("configure", configuration="science")``, or
    ``ack = archiver.command_now("configure", configuration="science")`` where nothing is awaited. Both return the
    final answer, whatever it is; ``ack.raise_if_failed()`` turns a refusal into an exception.

    Parameters
    ----------
    bus
        Its identity is who commands.
    name
        Component of the topic files, e.g. ``Archiver``.
    """

    def __init__(self, bus: Bus, name: str) -> None:
        self.bus, self.name = bus, name

    def command_now(self, verb: str, *, timeout_s: float = DEFAULT_TIMEOUT_S, **fields: Any) -> Ack:
        """Send a command and wait for its final answer; "in progress" adds its time to the limit.

        Raises
        ------
        DeadlineError
            No final answer within ``timeout_s`` real seconds.
        NotFoundError
            The component has no such command.
        """
        return self.bus.command(f"{self.name}.{verb}", fields, timeout_s)

    async def command(self, verb: str, *, timeout_s: float = DEFAULT_TIMEOUT_S, **fields: Any) -> Ack:
        """As :meth:`command_now`, for ``await``: other tasks go on meanwhile."""
        return await asyncio.to_thread(self.command_now, verb, timeout_s=timeout_s, **fields)

    @property
    def summary_state(self) -> SummaryState | None:
        """Last published summary state; None when it never spoke."""
        last = self.bus.latest(f"{self.name}.summaryState")
        return SummaryState(last.fields["summaryState"]) if last else None

    @property
    def detailed_state(self) -> dict[str, Any] | None:
        """Fields of the last detailedState; None when it never spoke."""
        last = self.bus.latest(f"{self.name}.detailedState")
        return dict(last.fields) if last else None

    def wait_for(self, state: SummaryState, timeout_s: float = DEFAULT_TIMEOUT_S) -> Message:
        """Wait until the component is in a summary state.

        Raises
        ------
        DeadlineError
            It was not within ``timeout_s`` real seconds.
        """
        deadline = time.monotonic() + timeout_s
        with self.bus.subscribe([f"{self.name}.summaryState"], start="latest") as states:
            seen = "nothing"
            while (left := deadline - time.monotonic()) > 0:
                for message in states.poll(left):
                    if message.fields["summaryState"] == state:
                        return message
                    seen = SummaryState(message.fields["summaryState"]).name
        raise DeadlineError(f"{self.name}: not {state.name} within {timeout_s:g} s; last seen: {seen}")
