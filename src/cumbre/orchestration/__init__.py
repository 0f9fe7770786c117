"""Orchestration: work with priority, deadline, retries and a recorded outcome, run by an existing engine.

In: ScriptQueue.nextVisit and nextVisitCanceled, Camera.endReadout, Image.hop (at_archive). Out: Image.hop
(preloaded, processed), Prompt.detectorProcessed, Prompt.visitQuality. Tables: ``orchestration.job`` and
``orchestration.attempt``; results go to Level 1 through ``cumbre.catalogs``. Engines: Dask distributed (a local
cluster or an address), or this process. Systems E1 (prompt), F1 (orchestration manager).
"""
