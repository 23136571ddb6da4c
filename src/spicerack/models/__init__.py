"""What is in a model, told from config.json, headers and transformers' classes: no weight is read but to look at it.

config roles census    what each tensor is, by names and shapes: needs neither torch nor transformers
architecture           the same by transformers' own classes, built without weights
blocks                 the repeated blocks of a model in memory, and what they are called with
kind inputs            decoder, encoder or neither; which ids, and how many, a model can be given
overview outliers choices   what it would weigh, how far weights stick out, which kernel each layer gets
families/              what differs between families, as data
bundled                the models that come along
"""
