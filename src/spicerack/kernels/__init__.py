"""How packed weights are multiplied with activations: which kernel takes a layer, how it lays weights out, and the
calls into it."""
