"""What differs between families of models, as data only: a new family is rows here, and no code."""
