"""The seam to transformers: a folder's model class, and the quantizer plug-in through which packed layers get in.

transformers builds the model, renames, ties, casts and initializes as it always does. Between building and loading it
asks its quantizer to prepare the model, and there the layers whose weights are packed are replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import CONFIG_MAPPING, MODEL_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from spicerack.errors import CheckpointError, LoadError, UntrustedCodeError, listed
from spicerack.models.architecture import harmless
from spicerack.nn.weight import PackedLayer

METHOD = "spicerack"
Prepare = Callable[[PreTrainedModel], None]


class SpicerackConfig(QuantizationConfigMixin):
    """Carries `prepare`, which replaces layers of a model on the meta device, to the quantizer."""

    def __init__(self, prepare: Prepare) -> None:
        self.quant_method = cast(QuantizationMethod, METHOD)
        self.prepare = prepare

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD}


class SpicerackQuantizer(HfQuantizer):
    """Calls `prepare` at the right moment; stays on the model, and keeps save_pretrained from writing nonsense."""

    quantization_config: SpicerackConfig

    def __init__(self, quantization_config: SpicerackConfig, **_kwargs: object) -> None:
        super().__init__(quantization_config)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_kwargs: object) -> PreTrainedModel:
        self.quantization_config.prepare(model)
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        """Adapters on top of it are."""
        return True


def config_and_class(
    config: Mapping[str, Any], folder: Path, *, trust_remote_code: bool = False
) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """transformers' config object and model class for the config.json of a float model.

    Code that came with the model is used only where transformers itself does not know the architecture, and only if it
    is trusted. Raises UntrustedCodeError, CheckpointError.
    """
    model_type = config.get("model_type")
    declared = config.get("architectures")
    names = [name for name in declared if isinstance(name, str)] if isinstance(declared, list) else []
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        try:
            built = CONFIG_MAPPING[model_type].from_dict(harmless(dict(config)))
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{folder / 'config.json'}: {error}", "the file is damaged, or newer than transformers"
            ) from error
        known = getattr(transformers, names[0], None) if names else None
        if isinstance(known, type) and issubclass(known, PreTrainedModel):
            return built, known
        if not names and type(built) in MODEL_MAPPING:
            return built, cast(type[PreTrainedModel], MODEL_MAPPING[type(built)])
    code = config.get("auto_map")
    if not isinstance(code, dict) or "AutoConfig" not in code:
        raise CheckpointError(
            f"{folder}: transformers {transformers.__version__} does not know {names[:1] or model_type!r}",
            "update transformers, or use a model that it knows",
        )
    if not trust_remote_code:
        raise UntrustedCodeError(
            f"{folder}: {model_type} needs Python code that came with the model",
            "read its *.py files, then pass --trust-remote-code (trust_remote_code=True)",
        )
    return _custom(config, code, folder)


def _custom(
    config: Mapping[str, Any], code: Mapping[str, str], folder: Path
) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    entry = next(
        (code[key] for key in ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModel") if key in code), None
    )
    if entry is None:
        raise CheckpointError(f"{folder / 'config.json'}: auto_map names no model class", "ask the model's author")
    config_class: Any = get_class_from_dynamic_module(code["AutoConfig"], folder)
    return config_class.from_dict(dict(config)), get_class_from_dynamic_module(entry, folder)


def build(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    tensors: dict[str, torch.Tensor],
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    prepare: Prepare | None = None,
) -> tuple[PreTrainedModel, list[str]]:
    """The model, on the CPU, in eval mode, filled with `tensors` -> (model, tensors it has no use for).

    dtype: None keeps what config.json says. prepare: called before `tensors` are looked at. Raises LoadError if a
    parameter stays without a value: transformers would only warn, and fill in random numbers.
    """
    quantization = None
    if prepare is not None:
        AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = SpicerackConfig
        AUTO_QUANTIZER_MAPPING[METHOD] = SpicerackQuantizer
        quantization = SpicerackConfig(prepare)
    try:
        with quiet():
            loaded: Any = model_class.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=dtype or "auto",
                quantization_config=quantization,
                output_loading_info=True,
                use_safetensors=True,
                local_files_only=True,
            )
    except (RuntimeError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise LoadError(
            f"{folder}: {model_class.__name__} cannot be filled: {error}", "is config.json the model's own?"
        ) from error
    model: PreTrainedModel = loaded[0]
    info: Mapping[str, Any] = loaded[1]
    _check(info, folder, model_class)
    model.name_or_path = model.config._name_or_path = str(folder)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model, sorted(info["unexpected_keys"])


@contextmanager
def quiet() -> Iterator[None]:
    """transformers draws a bar and prints a report for every load; callers draw their own, and `_check` raises."""
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _check(info: Mapping[str, Any], folder: Path, model_class: type) -> None:
    for kind, what in (
        ("missing_keys", "has no value"),
        ("mismatched_keys", "has another shape"),
        ("error_msgs", "failed"),
    ):
        names = sorted(map(str, info[kind]))
        if names:
            raise LoadError(
                f"{folder}: " + listed([f"{names[0]} of {model_class.__name__} {what}", *names[1:]], 1),
                "the folder is incomplete, or its config.json names another architecture",
            )


def tell_transformers(model: PreTrainedModel) -> None:
    """As after loading: what is packed is no parameter to tie, and save_pretrained refuses to write it."""
    if any(isinstance(layer, PackedLayer) for layer in model.modules()):
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        ties: dict[str, str] = model.all_tied_weights_keys
        model.all_tied_weights_keys = {a: b for a, b in ties.items() if a in parameters and b in parameters}
        vars(model)["hf_quantizer"] = SpicerackQuantizer(SpicerackConfig(_nothing))


def tell_trainers(model: PreTrainedModel) -> None:
    """As a model that trains: not quantized any more, if it was, and with its ties."""
    if vars(model).pop("hf_quantizer", None) is None:
        return
    for holder, marks in (
        (model, ("is_quantized", "quantization_method")),
        (model.config, ("quantization_config", "_is_quantized")),
    ):
        for mark in marks:
            vars(holder).pop(mark, None)
    found = dict(model.named_parameters(remove_duplicate=False))
    ties: dict[str, str] = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.all_tied_weights_keys = {a: b for a, b in ties.items() if a in found and found[a] is found.get(b)}


def _nothing(_model: PreTrainedModel) -> None:
    """The layers are in place already."""
