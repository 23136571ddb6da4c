"""How tensors live on disk: folders in, folders out, whole or not at all."""
