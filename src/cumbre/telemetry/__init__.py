"""Telemetry: the engineering and facilities database (EFD) and what is made of it.

In: every message of the bus. Out: the replica at the archive (``archive/efd``), EfdReplicator.replica.
System C3 (EFD replication); led by the EfdReplicator entity.
"""
