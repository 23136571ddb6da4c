"""Formats of quantized folders: a file declares one as FORMAT, a `storage.format.Format`, which says what it holds, how
tensors lie and what config.json says of them.

Files with an underscore are parts of one. A format that is added is taken where its rank comes first and it has no
obstacles; nothing else changes.
"""
