"""What is in a model, told from config.json, headers and transformers' classes: no weight is read but to look at it."""
