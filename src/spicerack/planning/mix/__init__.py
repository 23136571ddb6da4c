"""Which bits where: what each part of a model loses in each scheme, and the mix that a budget buys.

units      tensors that must have one scheme, and the schemes that each may have
fisher     how much the model's output minds an error in each output of each layer: one backward pass
estimate   loss of every unit in every scheme, by that and by the error of the codes themselves
knapsack   one scheme for each unit: the least loss within a cost, exactly
judge      what a written folder really loses, on text that the search has not seen
search     rounds: solve, write, measure, correct
run        the whole of it, for the command and for Python
"""
