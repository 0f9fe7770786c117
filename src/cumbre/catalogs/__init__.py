"""Catalogues: their schemas and their databases.

In: sources, objects and forced photometry of each detector from prompt processing. Out: PostgreSQL tables of
``level1`` (and the alert outbox beside them), regions for the next visit, light curves, cones. One Felis file
describes tables and packets: ``level1.yaml``.
"""
