"""Codes chosen by what flows through a model, block by block: the loop, and what it knows of a block, its layers and
their inputs."""
