"""From the camera's store to raw files.

In: ``Camera.endReadout`` and ``HeaderService.largeFileObjectAvailable`` events, the camera's DAQ store
(``summit/daq``), headers (``summit/headers``); commands ``Writer.writeImage`` and ``Writer.recapture``; or files
of a camera that writes its own.
Out: one FITS file a detector, the manifest of expected detectors and the header sidecar under ``summit/raw``;
``Image.hop`` events ``written`` and ``quarantined``, ``Writer.imageWritten``. Several nodes share each image and
take over from each other. A catch-up scan finds images whose event was lost.
Serves B1, B2 and the capture side of B12.
"""
