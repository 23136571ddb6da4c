"""What differs between families of models, as data only: a new family is rows here, and no code.

    names      what parts of models are called, over all families
    folds      where factors can be moved between parts of a block
    residual   what reads and writes the residual stream

Whatever is here is checked where it is used: a fold that changes what a block computes is left out, and layers that do
not share an input after all compute for themselves.
"""
