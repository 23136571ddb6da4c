"""The repeated blocks of a model: which they are, what they are called with, what happens in them.

stack    what a block is called with, and how it is run alone
find     which modules they are, and whether they can be run alone
reads    which weights code computes with, called or not
look     inputs of the layers in a block, outputs of a block
"""
