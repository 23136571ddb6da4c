"""How packed weights are multiplied with activations."""
