"""A model in memory: a folder loaded into transformers' own classes or a module of one's own, and written back.

    load folder places slots   from a folder to packed layers
    hf                         the seam to transformers
    parts save                 from packed layers to a folder
    cache                      keys and values in few bits, without the caller's doing
    generate                   a text continued

Whatever class the model's users expect is what they get; what differs is inside its layers.
"""
