"""Which part of a model text flows through: in a model for pictures or sound as well, the language model in it."""

from __future__ import annotations

from transformers import PreTrainedModel

from spicerack.models.kind import senses


def language_model_of(model: PreTrainedModel) -> str | None:
    """The path of the language model in a model of several kinds of input; what lies outside of it no text reaches.

    It is the innermost model of transformers that has the embedding of tokens. None where that is the model itself, or
    its embedding is not known, so that nothing can be said to lie outside; and of a model for text alone, where what
    lies outside are heads, which text does reach.
    """
    if senses(type(model)) == ("text",):
        return None
    try:
        embedding = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    inner = [
        path for path, part in model.named_modules()
        if isinstance(part, PreTrainedModel) and any(module is embedding for module in part.modules())
    ]  # fmt: skip
    return max(inner, key=len) or None if inner else None
