"""Release catalogues: described, loaded hidden, verified, opened, closed (DMS; SYSTEMS G9)."""
