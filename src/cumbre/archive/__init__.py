"""The way of raw files from the summit to the base and on to the archive.

In: ``Image.hop`` events ``written`` (summit) and ``at_base`` (base), raw files, the network.
Out: verified copies in raw caches, tape volumes and outage buffers; ``Image.hop`` events ``buffered``,
``sent``, ``at_base``, ``at_archive``, ``base_tape``, ``archive_tape``, ``quarantined``.
A relay (replicator, forwarder) keeps every file in its buffer until the receiver has verified it; a
distributor answers only after the file is on its disk. The tape writer of a place follows its hops, the
Catch-Up Archiver brings what the usual way left behind, disks carry what no link can. Serves B4 to B8 and the
deleting side of B12.
"""
