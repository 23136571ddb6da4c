"""What a model is made of, from config.json alone: kinds of layers, and tensors with their shapes.

fields   config.json asked for sizes; what is missing is refused by name
kinds    of layers: what each looks back at
parts    of blocks, as the tensors that checkpoints have for them
towers   for pictures
shapes   families: which parts each has
"""
