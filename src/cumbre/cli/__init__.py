"""The ``cumbre`` command: one file a verb."""
