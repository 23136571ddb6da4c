"""A model in memory: loaded with packed layers in it, run, saved again."""
