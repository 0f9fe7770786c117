"""Pages: what a person looks at during and after a night, each also as JSON.

In: the ledger, Level 1, the bus. Out: HTML and JSON of the same URL (``/flow`` and ``/flow.json``), live by
Server-Sent Events. Serves A8 (thin), B12, E8 (thin).
"""
