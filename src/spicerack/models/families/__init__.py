"""What differs between families of models, as data only."""
