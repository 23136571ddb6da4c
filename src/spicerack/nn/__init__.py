"""Modules whose weights stay packed, and what a model gains by knowing its own structure: native attention and
encoders, a cache in few bits.

    weight                             a matrix as its kernel packed it
    linear embedding conv experts      layers in the place of torch's and transformers'
    kinds                              the table of layers that have such a twin
    fused attention                    what parts of one model are computed as
    encoder                            encoders that one native call computes
    cache cache_segments               keys and values in few bits

A model's own code calls these as it called what they replace; none of it is patched.
"""

# A model that is unpickled has the name of this attention in its config, and nothing else that would import it.
from spicerack.nn import attention  # noqa: F401
