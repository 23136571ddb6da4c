"""How tensors lie on disk: folders read and written whole or not at all, and what became of every tensor.

    durable   single files that survive a crash; locks
    files     which files a folder has, and which of them are trusted
    reader    a folder in: headers, then one tensor at a time
    writer    a folder out: shard after shard, one rename at the end
    format    what quantized tensors look like in one; formats/ has one file for each
    ledger    what became of every tensor

Nothing here knows how codes are chosen or multiplied.
"""
