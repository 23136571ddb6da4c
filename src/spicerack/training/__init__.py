"""Learning in few bits by one command: text, teacher, steps, checkpoints, and the folder that comes out."""
