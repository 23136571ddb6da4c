"""Codes chosen by what flows through a model, block by block: `loop.py` says how, and what that gives up.

loop                    one block after the other, four steps each
pair flow weights       a block twice, and what runs through it
targets chunks states   its layers, the text, what lies on disk
transforms folding      factors that make layers easier to round
inputs solving          what layers get, and their codes
static observer histogram observers/   scales of static activations
exchange                between ranks
"""
