"""What quantizing costs, and what is left of the model."""
