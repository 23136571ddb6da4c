"""Named schemes, one file each: a file `name.py` declares SCHEME, a `numerics.scheme.Scheme` of that name. Levels that
are of no kind in `numerics.levels` are a class in the same file."""
