"""Images: the catalogue of what there is, and cutouts that read only the bytes they need.

In: the ledger's raw files, templates, and whatever else is registered. Out: rows of ``access.image`` (which
``ivoa.obscore`` shows), sections of FITS files, previews. Embargo is decided here, for every path that leads to
pixels. Systems G2, G4, C3.
"""
