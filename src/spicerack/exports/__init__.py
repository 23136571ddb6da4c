"""Models for other engines: the codes that were chosen here, in the files that they read, and back.

    source     what is exported: a folder, walked a tensor at a time
    target     `Target`, the interface of where models go, and the plug-ins in `targets/`
    verify     what was written, read back by the engine's own reader, or by one of `readers/`
    planning   all that can be refused, before a byte is written
    export     `spicerack.export`: all of it in order

Codes are kept. What a target cannot hold is refused before a byte is written, by layer, rule and nearest scheme; what
was written is read back before it gets its name.
"""
