"""What is in a model, told from its headers and its classes."""
