"""Whether a model fits, where, and how fast it will be, before anything is quantized or bought; which bits where.

    anatomy     config.json -> kinds of layers, and the tensors that a folder of it would have
    model       a folder or a config -> weights with their places: input table, layers, head, towers
    cache       bytes of keys, values and states by each engine's rules
    buffers     what is alive while a model computes
    precisions  the numbers that engines hold weights in, and what each weight then takes
    engines     a plug-in each: what it reads, how it splits, what it adds, the flags to paste
    placement   layers over devices, and what is left for the host
    speed       tokens per second, from bytes, layers and measured constants
    plan        all of that together: rows, what is recommended, what would make it fit
    budget      a size, bits, or a bound on loss, as people write them
    sensitivity what each part of a model loses in each scheme: a file in the output
    mix         finds that out, and the mix of schemes that a budget buys

Nothing here but `mix` reads a weight or loads torch. Every figure says whether it is exact, by a formula that was
checked, or an estimate.
"""
