"""Data access over HTTP beside the bare engines: ``python benchmarks/access.py [--rows 10_000_000] [--json]``.

The same as ``cumbre benchmark access``, which takes the same options.
"""

from cumbre.cli.benchmark import access

if __name__ == "__main__":
    access()
