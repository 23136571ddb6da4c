"""A model in memory: loaded, run, saved."""
