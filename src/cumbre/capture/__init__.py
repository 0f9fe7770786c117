"""From the camera's store to raw files.

In: ``Camera.endReadout`` and ``HeaderService.largeFileObjectAvailable`` events, the camera's DAQ store
(``summit/daq``), headers (``summit/headers``); or files of a camera that writes its own.
Out: one FITS file a detector, the manifest of expected detectors and the header sidecar under ``summit/raw``;
``Image.hop`` events ``written`` and ``quarantined``. A catch-up scan finds images whose event was lost.
Serves B1, B2 and the capture side of B12.
"""
