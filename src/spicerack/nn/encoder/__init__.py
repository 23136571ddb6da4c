"""Encoders that one native call computes, unseen by their own code.

parts     whether a model has the parts of a family, and why not
plan      its native steps
inputs    what it was asked for, as the steps take it
whole     the model's `forward`: the plan, or its modules
"""
