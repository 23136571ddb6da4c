"""A model as a planner sees it: its weights with their places, what each layer keeps, what config.json says.

From a folder (headers alone), or from a config.json, whose tensors are told by `anatomy`. Both go through the same
census, so that what `inspect` and `quantize` call a linear layer is one here. Experts that are alike are one weight
with their number.

Places decide who holds a weight and who reads it: the input table is looked up, a row for each token, and costs memory
and no bandwidth; a head that is tied to it reads all of it; of routed experts a token reads those that it is sent to.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from spicerack.errors import CheckpointError
from spicerack.models import census
from spicerack.models.census import Census, Entry
from spicerack.models.opening import open_stored
from spicerack.models.overview import quantized_with
from spicerack.planning import cache
from spicerack.planning.anatomy import pictures, shapes
from spicerack.planning.anatomy.fields import Fields, text_of
from spicerack.planning.anatomy.pictures import Picture
from spicerack.storage import files, released
from spicerack.storage.reader import BITS, Checkpoint, TensorInfo

Place = Literal["input", "layer", "output", "tower", "encoder", "extra"]
"""input    the table of tokens
layer    a block of the decoder
output   the head, and what stands before it
tower    for pictures or sound, projectors too
encoder  of an encoder-decoder: it runs once for each input
extra    layers that predict several tokens: in the file, and read by nobody unless asked to"""
Purpose = Literal["text", "embeddings", "sequences", "pictures or sound"]
"""text               goes on with what it reads
embeddings         reads text, and keeps nothing of it
sequences          writes what an encoder's input tells it: translations, summaries, transcripts
pictures or sound  reads no text"""

_TOWERS = frozenset({
    "visual", "vision_tower", "vision_model", "vision_encoder", "vision_embed_tokens", "audio_tower", "audio_model",
    "multi_modal_projector", "embed_vision", "embed_audio", "mm_projector", "img_processor", "aligner",
})  # fmt: skip
"""Components of names of what is for pictures and sound."""
_GENERATES = re.compile(r"ForCausalLM|LMHeadModel|ForConditionalGeneration|DoubleHeadsModel|MTModel|Seq2Seq")
"""Classes that write text."""
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|block|blocks|layer)\.(\d+)\.")
_STAGE = re.compile(r"(?:^|\.)(?:stages|layers|block)\.(\d+)\.(?:(?:layers|blocks)\.)?(\d+)\.")
"""A block of a stage, of models for pictures."""
_POSITIONS = re.compile(r"(?:^|\.)(?:position_embeddings?(?:\.weight)?|pos_embed)$")
_EXPERT = re.compile(r"\bexperts\.(\d+)\.")
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_EXPERTS_USED = (
    "num_experts_per_tok", "experts_per_token", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_k",
    "moe_top_k",
)  # fmt: skip
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor, or several that are alike.

    entry    what the census says of the first
    count    how many
    place    who holds it
    layer    its number, of a block
    routed   it is an expert's, of which a token uses a few
    """

    entry: Entry
    count: int
    place: Place
    layer: int | None
    routed: bool

    @property
    def numel(self) -> int:
        """Numbers in all of them."""
        return self.entry.info.numel * self.count


@dataclass(frozen=True, eq=False)
class Model:
    """What is planned for. Two are the same only if they are one: what was weighed of it is remembered by that.

    name     the folder or file
    config   of the float model
    census   of its tensors, experts that are alike once
    weights  all of them, tied ones once
    tied     the head is the input table
    stored   bytes in the files as they are; None of a config
    method   who quantized the files; None for floats
    """

    name: str
    config: Mapping[str, Any]
    census: Census
    weights: tuple[Weight, ...]
    tied: bool
    stored: int | None
    method: str | None

    @cached_property
    def text(self) -> Mapping[str, Any]:
        """The config of the language model."""
        return text_of(self.config)

    @cached_property
    def fields(self) -> Fields:
        """The same, to be asked."""
        return Fields(self.text, self.family)

    @property
    def family(self) -> str:
        """model_type of the language model."""
        return str(self.text.get("model_type", self.config.get("model_type", "unknown")))

    @property
    def generates(self) -> bool:
        """Whether it writes text, and so keeps tokens; an encoder keeps none."""
        classes = self.config.get("architectures")
        return not isinstance(classes, list) or any(_GENERATES.search(str(name)) for name in classes)

    @property
    def does(self) -> Purpose:
        """What it is for, by its classes, its config, and whether it has a table of tokens."""
        # a vocabulary without a table is of what is written, or of codes that pictures are trained to name
        if self.text.get("vocab_size") is None or not any(weight.place == "input" for weight in self.weights):
            return "pictures or sound"
        if not self.generates:
            return "embeddings"
        return "sequences" if self.config.get("is_encoder_decoder") else "text"

    @cached_property
    def layers(self) -> tuple[cache.Layer, ...]:
        """What each layer of the decoder, or of an encoder without one, keeps."""
        if not self.generates:
            return (cache.Layer("none"),) * max((w.layer + 1 for w in self.weights if w.layer is not None), default=1)
        return tuple(cache.layers(self.config))

    @cached_property
    def parameters(self) -> int:
        """Numbers that the model has, tied ones once."""
        return sum(weight.numel for weight in self.weights)

    @cached_property
    def read(self) -> int:
        """Numbers that one token reads: all but the input table (unless it is the head), idle experts and towers."""
        skipped: tuple[Place, ...] = ("tower", "encoder", "extra") if self.tied else (
            "input", "tower", "encoder", "extra"
        )  # fmt: skip
        return round(sum(w.numel * (self.used if w.routed else 1) for w in self.weights if w.place not in skipped))

    @cached_property
    def active(self) -> int:
        """The same with the input table, as many model cards count."""
        table = sum(w.numel for w in self.weights if w.place == "input")
        return self.read + (0 if self.tied else table)

    @cached_property
    def experts(self) -> int:
        """Routed experts of a layer; 0 for a model that is dense."""
        if not any(weight.routed for weight in self.weights):
            return 0
        return self.fields.size(*_EXPERTS)

    @property
    def chosen(self) -> int:
        """How many of them a token is sent to; 1 where there are none."""
        return self.fields.size(*_EXPERTS_USED) if self.experts else 1

    @property
    def used(self) -> float:
        """Share of the routed experts that a token reads."""
        return self.chosen / self.experts if self.experts else 1.0

    @property
    def positions(self) -> int | None:
        """Tokens that the model was made for, as config.json says."""
        names = ("max_position_embeddings", "n_positions", "max_target_positions")
        return next((self.text[name] for name in names if type(self.text.get(name)) is int), None)

    @cached_property
    def picture(self) -> Picture | None:
        """What its pictures are, where it reads nothing but these."""
        if self.does != "pictures or sound":
            return None
        tables = (w.entry.info.shape for w in self.weights if _POSITIONS.search(w.entry.info.name))
        positions = next((shape[-2] for shape in tables if len(shape) in (2, 3)), None)
        return pictures.of_config(self.config, positions)

    @property
    def recurrent(self) -> bool:
        """Whether no layer keeps tokens: any context costs the same."""
        return all(layer.keys + layer.values == 0 for layer in self.layers)

    @property
    def float_bytes(self) -> int:
        """Bytes of a number of the model's own type."""
        return BITS[_dtype(self.config)] // 8

    @property
    def source_tokens(self) -> int:
        """Tokens of an encoder that a decoder reads; 0 without one. T5's are the longest that it was trained on."""
        if not self.config.get("is_encoder_decoder"):
            return 0
        return self.fields.size("max_source_positions", "n_positions", default=512)


def open_model(source: str | Path) -> Model:
    """A float model: a folder or hub id, of which headers are read, or a config.json, whose tensors follow from its
    family.

    Raises CheckpointError: no model, a family whose tensors are not known, fields that are missing, by their names.
    """
    path = Path(source)
    if path.is_file() and path.suffix == ".json":
        return of_config(files.read_json(path, 1 << 24), str(source))
    raw = open_stored(source)
    if (raw.folder / files.LEDGER).is_file():
        raise CheckpointError(
            f"{source} is quantized already, and is planned from the float model that it was made from",
            "give that model",
        )
    checkpoint = released.decoded(raw)
    stored = sum(info.nbytes for info in raw.tensors.values())
    method = quantized_with(raw.config)
    if quantized_with(checkpoint.config) is not None:
        raise CheckpointError(f"{source} is quantized already, with {method}", "give the float model")
    return _model(str(source), checkpoint, stored, method)


def of_checkpoint(name: str, checkpoint: Checkpoint) -> Model:
    """The same from headers, or from what a ledger says that headers were; nothing is read of the tensors."""
    return _model(name, checkpoint, None, None)


def of_config(config: Mapping[str, Any], name: str = "config.json") -> Model:
    """The same from what a config.json holds. A section about quantization tells how the model is distributed."""
    dtype = _dtype(config)
    infos = {}
    counts = {}
    for tensor in shapes.tensors(config):
        nbytes = math.prod(tensor.shape) * BITS[dtype] // 8
        infos[tensor.name] = TensorInfo(tensor.name, dtype, tensor.shape, nbytes, "")
        counts[tensor.name] = tensor.count
    bare = {key: value for key, value in config.items() if key != "quantization_config"}
    checkpoint = Checkpoint(Path(name), bare, infos, (), ())
    return _model(name, checkpoint, None, quantized_with(config), counts)


def _model(
    name: str, checkpoint: Checkpoint, stored: int | None, method: str | None, counts: Mapping[str, int] | None = None
) -> Model:
    """counts: of tensors that are alike, where they are known; else experts are counted by their numbers."""
    if counts is None:
        checkpoint, counts = _alike(checkpoint)
    taken = census.take(checkpoint)
    total = Fields(text_of(checkpoint.config), "model").size(
        "num_hidden_layers", "n_layer", "num_layers", "decoder_layers", default=1 << 30
    )
    both = bool(checkpoint.config.get("is_encoder_decoder"))
    stages = {}
    if isinstance(checkpoint.config.get("depths"), list):
        matches = {tuple(map(int, m.groups())) for name in checkpoint.tensors if (m := _STAGE.search(name))}
        stages = {block: number for number, block in enumerate(sorted(matches))}
    weights = tuple(
        _weight(entry, counts[tensor], total, stages, both=both)
        for tensor, entry in taken.entries.items()
        if tensor not in taken.tied
    )
    return Model(name, checkpoint.config, taken, weights, bool(taken.tied), stored, method)


def _alike(checkpoint: Checkpoint) -> tuple[Checkpoint, dict[str, int]]:
    """The same with one expert of those of a layer that have one type and shape, and how many each stands for."""
    first: dict[tuple[str, str, tuple[int, ...]], str] = {}
    counts: dict[str, int] = {}
    for name, info in checkpoint.tensors.items():
        if "experts." not in name:
            counts[name] = 1
            continue
        kind = (_EXPERT.sub("experts.*.", name), info.dtype, info.shape)
        name = first.setdefault(kind, name)
        counts[name] = counts.get(name, 0) + 1
    return dataclasses.replace(checkpoint, tensors={name: checkpoint.tensors[name] for name in counts}), counts


def _weight(entry: Entry, count: int, total: int, stages: Mapping[tuple[int, ...], int], *, both: bool) -> Weight:
    """total: blocks that config.json counts; what lies behind them predicts several tokens. stages: numbers of stages
    and of blocks in them -> the block's of all. both: there is an encoder beside the decoder; of others the encoder is
    the model."""
    parts = entry.module.split(".")
    match = _LAYER.search(entry.name)
    layer = int(match[1]) if match else None
    if stages:
        staged = _STAGE.search(entry.name)
        layer, total = stages[tuple(map(int, staged.groups()))] if staged else None, len(stages)
    routed = "experts" in parts[:-1] or entry.role == "experts" or "experts" in entry.name.split(".")
    if _TOWERS & set(parts):
        return Weight(entry, count, "tower", None, False)
    if both and "encoder" in parts[:2]:
        return Weight(entry, count, "encoder", None, False)
    if parts[0].startswith("mtp") or (layer is not None and layer >= total):
        return Weight(entry, count, "extra", None, routed)
    if layer is not None:
        return Weight(entry, count, "layer", layer, routed)
    return Weight(entry, count, "input" if entry.role == "embedding" else "output", None, False)


def _dtype(config: Mapping[str, Any]) -> str:
    """safetensors' name of the type that the weights have; BF16 where config.json says nothing."""
    for section in (text_of(config), config):
        word = section.get("dtype") or section.get("torch_dtype")
        if isinstance(word, str):
            return _DTYPES.get(word.removeprefix("torch."), "BF16")
    return "BF16"
