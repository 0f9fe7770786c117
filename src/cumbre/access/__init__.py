"""Data access: one ADQL query over every table, whatever engine holds it.

In: an ADQL text, the tables a user may see, uploads, limits. Out: Arrow batches and documents made of them
(VOTable, Parquet, FITS, CSV, TSV, JSON), streamed. Levels: ``adql`` (text → tree → typed SQL), ``planner``
(which engine, which pixels), ``engines`` (PostgreSQL, DuckDB), ``results`` (encoders). Systems G1, G6, C3.
"""
