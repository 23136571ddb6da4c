"""Models in GGUF files: what they are called there, and a checkpoint that shows them as transformers knows them.

family       what a family is called in both: modules, keys of its config, what llama.cpp computes
families     one file of data each
names        tensor of a checkpoint -> its place in a file, and the other way
rope         rotary embeddings: their parameters as keys and tensors, both ways
config       config.json <-> metadata
checkpoint   `GgufCheckpoint`: a file under transformers' names
"""
