"""Data only: names, shared inputs and orientations, per family of models."""
