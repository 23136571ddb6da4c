"""Float folder in, quantized folder out: which tensor gets which numbers, in how much memory, and the run itself.

    recipe decisions job    rules -> a scheme for each tensor -> everything that is knowable before a weight is read
    memory                  what will be in memory
    calibration/            codes chosen by what flows through the model, block by block
    stream                  tensor after tensor into shards
    preflight               the first blocks, before the rest
    run modules/            the two ways in: a folder, a module in memory
    rotation                a checkpoint whose residual stream is turned
    watch bar               whoever looks on; what the command line and progress=True draw
    early                   what headers refuse before torch is there

A run reads one folder and writes one folder. What it is asked to do is decided first and as a whole (`Job`), so that
whatever can be refused is refused before a weight is read.
"""
