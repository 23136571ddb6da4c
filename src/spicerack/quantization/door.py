"""What is refused of a float folder before anything is decided: that it is no float model, or does not fill its class.

Both would end in a folder that is written in full and loads wrong, or not at all. A model that another tool quantized
is told by config.json where that says so, and here by what the folder holds: codes where the class has floats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from spicerack.errors import CheckpointError, listed
from spicerack.models.architecture import destinations, obstacle
from spicerack.models.census import BY_DEFAULT, ON_REQUEST
from spicerack.models.fit import Fit, fit, renamed
from spicerack.quantization import decisions
from spicerack.quantization.decisions import Source
from spicerack.storage.reader import Checkpoint, TensorInfo

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_LISTED = 3
"""Tensors that a message names before it counts the rest."""
_TRACES = {
    ".SCB": "bitsandbytes",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "FP8 or compressed-tensors",
    ".weight_scale_inv": "FP8",
    ".W_q": "HQQ",
    ".Qidxs": "QuIP#",
    ".q_weight": "EXL2",
    ".weight._data": "quanto",
    "_blocks": "MXFP4",
}
"""How names of tensors end that other tools write in place of weights, or beside them -> the tool."""


def check(source: Source) -> list[str]:
    """Notes on a folder that can be quantized, for people: which of its tensors nobody reads.

    Raises CheckpointError for weights that are codes already, for a config.json that makes no model of its class, for
    parameters of the class that no tensor fills, and for tensors of another shape; a prefix that is all that is wrong
    is named.
    """
    _refuse_codes(source)
    if source.model is None:
        _refuse_senseless(source.checkpoint)
        return []
    shapes = {name: info.shape for name, info in source.checkpoint.tensors.items()}
    fitting = fit(source.model, shapes)
    _refuse_unfilled(source, fitting)
    return list(_unread(source, fitting))


def promised(checkpoint: Checkpoint) -> tuple[frozenset[str], str | None]:
    """Tensors that stay in float although by their names they would be quantized, and why the folder is refused, if it
    is: asked of transformers, for those who show what it would weigh.

    checkpoint: of a float model.
    """
    source = Source.of(checkpoint)
    try:
        check(source)
    except CheckpointError as error:
        return frozenset(), error.message
    return decisions.kept(source), None


def _refuse_codes(source: Source) -> None:
    """Raise CheckpointError for a folder that holds integers, or bytes of FP8, where its class has floats."""
    tensors = source.checkpoint.tensors
    tools = sorted({tool for ending, tool in _TRACES.items() if any(name.endswith(ending) for name in tensors)})
    for name, wanted in _weights(source):
        info = tensors[name]
        if info.dtype not in _FLOATS:
            by = f", as {' or '.join(tools)} writes them" if tools else ""
            raise CheckpointError(
                f"{source.checkpoint.folder} is quantized already: {name} is {info.dtype}{by}, and {wanted}",
                "start from the float model: every rounding adds up",
            )


def _refuse_senseless(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError where transformers knows the class and cannot make it: nobody could load the result."""
    if (reason := obstacle(checkpoint.config)) is not None:
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: {reason}",
            "is it the model's own, and no newer than the transformers that is installed?",
        )


def _weights(source: Source) -> Iterator[tuple[str, str]]:
    """Tensors that should be floats, each with who says so: those that become a parameter of the class, those that
    roles are known of, and those with a name that only codes have."""
    tensors, entries = source.checkpoint.tensors, source.census.entries
    places = {} if source.model is None else destinations(source.model, tensors)
    state = {} if source.model is None else source.model.state_dict()
    for name, info in tensors.items():
        if name in places:
            if _may_be_codes(info) and state[places[name].parameter].is_floating_point():
                yield name, f"{type(source.model).__name__} has floats there"
        elif len(info.shape) > 1 and source.model is None and entries[name].role in BY_DEFAULT | ON_REQUEST:
            yield name, "by its name it is a layer's weight"
        elif any(name.endswith(ending) and _without_weight(name, ending, tensors) for ending in _TRACES):
            yield name, "there is no weight beside it"


def _may_be_codes(info: TensorInfo) -> bool:
    """Whether a tensor can hold a layer's codes: masks are not, nor are vectors, which nobody quantizes: norms of ones
    that were stored as integers are numbers like any others."""
    return len(info.shape) > 1 and info.dtype != "BOOL"


def _without_weight(name: str, ending: str, tensors: Mapping[str, object]) -> bool:
    """Whether the layer that a tensor belongs to, by its name's ending, has no weight of its own."""
    layer = name.removesuffix(ending)
    return f"{layer}.weight" not in tensors and layer not in tensors


def _refuse_unfilled(source: Source, fitting: Fit) -> None:
    """Raise CheckpointError where tensors do not fill the class, with what would help."""
    folder, model = source.checkpoint.folder, source.model
    assert model is not None, "asked before"
    cls = type(model).__name__
    if fitting.missing:
        shapes = {name: info.shape for name, info in source.checkpoint.tensors.items()}
        if (part := renamed(model, shapes)) is not None:
            name, tool = part
            example = next(tensor for tensor in shapes if name in tensor)
            who = f", as {tool} writes them" if tool else ""
            raise CheckpointError(
                f"{folder}: {cls} does not find {len(fitting.missing)} of its parameters: names have {name!r} in them"
                f"{who}, such as {example}",
                f"save the model inside of it, or rename the tensors: without {name!r} they fit",
            )
        have = "has" if len(fitting.unplaced) == 1 else "have"
        placeless = f"; {listed(fitting.unplaced, 1, 'tensors')} {have} no place in it" if fitting.unplaced else ""
        raise CheckpointError(
            f"{folder}: no tensor fills {listed(fitting.missing, _LISTED, 'parameters')} of {cls}{placeless}",
            "the folder is incomplete, or its config.json names another architecture",
        )
    if fitting.mismatched:
        name, (stored, wanted) = next(iter(fitting.mismatched.items()))
        raise CheckpointError(
            f"{folder}: {name} is {list(stored)}, and {cls} has {list(wanted)} there", "is config.json the model's own?"
        )


def _unread(source: Source, fitting: Fit) -> Iterator[str]:
    """A note on tensors that the class has no place for."""
    if fitting.unplaced:
        share = sum(source.checkpoint.tensors[name].nbytes for name in fitting.unplaced) / source.census.nbytes
        much = f" ({share:.0%} of the bytes)" if share >= 0.01 else ""
        unread = listed(fitting.unplaced, _LISTED, "tensors")
        as_is = "as it is" if len(fitting.unplaced) == 1 else "as they are"
        yield f"{type(source.model).__name__} does not read {unread}{much}: copied {as_is}"
