"""What quantizing lost and what it gained, measured on folders as they ship: perplexity, divergence, agreement, bytes,
speed.

    evaluate language logits     predictions of decoders, two models over the same windows
    encoder sentences            embeddings of encoders, two models over the same sentences
    intervals                    what can be said of a mean
    bench turns timing           speed, models taking turns
    folder                       what is read of a model's folder for it

Nothing here simulates: models are loaded as their users load them.
"""
