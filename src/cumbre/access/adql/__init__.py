"""ADQL 2.1: text → tokens → tree → typed SQL of an engine. Only what the tree can hold can ever run."""
