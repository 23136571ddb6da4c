"""`spicerack train`: training in few bits as a command, on transformers' Trainer."""
