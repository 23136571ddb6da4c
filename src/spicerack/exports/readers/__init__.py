"""Who reads back what was written: a file declares one `exports.verify.Reader` as READER.

A reader is an engine's own code, taken where it is installed, or code that shares nothing with what writes.
"""
