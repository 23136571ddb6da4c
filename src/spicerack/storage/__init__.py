"""How tensors lie on disk: folders read and written whole or not at all, and what became of every tensor."""
