"""cumbre: an observatory's data management system, from the shutter to the astronomer."""

__version__ = "0.1.0"
