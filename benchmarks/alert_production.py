"""From one raw file to alerts by step, with peers: ``python benchmarks/alert_production.py [--field crowded] [--json]``.

The same as ``cumbre benchmark alerts``, which takes the same options.
"""

from cumbre.cli.benchmark import alerts

if __name__ == "__main__":
    alerts()
