"""Commandable components: state machine, bus face, audit trail, client.

In: commands ``<Component>.<verb>`` of ``bus/topics/generics/commandable.yaml``. Out: acknowledgements,
summaryState, detailedState, errorCode, configurationApplied, heartbeat. Tables: control.entity,
control.command. Systems A2 (commandable component kit).
"""
