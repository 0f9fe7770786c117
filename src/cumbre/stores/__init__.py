"""Where things are kept: relational tables, files and objects.

In: rows, bytes, files. Out: the same, verified. Nothing here knows what the data mean.
``postgres`` starts and reaches a PostgreSQL server, ``migrations`` brings schemas to their version,
``files`` writes and copies files with checksums, ``objects`` is one face for folders and S3 buckets.
Serves every system number that stores something.
"""
