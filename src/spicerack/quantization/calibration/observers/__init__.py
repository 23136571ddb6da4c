"""Observers of ranges, one file each: from all inputs of a layer to the one scale that they are rounded by.

A new file here is a new observer. Its name is that of the file, in `--observer`, recipes and ledgers; it declares
OBSERVER, which begins to observe one layer: see `observer.py`, and `histogram.py` for those that want all magnitudes.
"""
