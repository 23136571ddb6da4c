"""Engines that run models: a file declares one `storage.engine.Engine` as ENGINE, data, each rule with its source.

A rule that is found to be wrong is mended here, and everybody who asks (`quantize --for`, `formats`, `export`) knows.
"""
