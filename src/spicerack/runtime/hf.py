"""The seam to transformers: a folder's model class, and the quantizer plug-in through which packed layers get in.

transformers builds the model, renames, ties, casts and initializes as it always does. Between building and loading it
asks its quantizer to prepare the model, and there the layers whose weights are packed are replaced (`load` tells the
whole way). The plug-in is entered into transformers' tables when a model needs it, not on import. It never reads a
weight itself. What it leaves on a model keeps `save_pretrained` from writing names that nobody reads, and holds nothing
of the load: models that were loaded are copied, pickled and cast like others. transformers' own marks of quantized
models are taken away, because with them `half` and `float` are refused, which cast what is float here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, MODEL_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from spicerack.errors import CheckpointError, LoadError, UntrustedCodeError, listed
from spicerack.models.architecture import harmless, stranger
from spicerack.nn.weight import PackedLayer

METHOD = "spicerack"
"""Name of the plug-in in transformers' tables of quantizers."""
Prepare = Callable[[PreTrainedModel], None]
"""Replaces layers of a model on the meta device, in place."""


class SpicerackConfig(QuantizationConfigMixin):
    """Carries `prepare` to the quantizer: transformers makes one from the other."""

    def __init__(self, prepare: Prepare) -> None:
        self.quant_method = cast(QuantizationMethod, METHOD)
        self.prepare = prepare

    def to_dict(self) -> dict[str, Any]:
        """What transformers compares and logs: the name alone."""
        return {"quant_method": METHOD}


class SpicerackQuantizer(HfQuantizer):
    """transformers' idea of a quantizer: it is asked to prepare a model that is built and empty, and what it allows.

    One that prepares nothing stays on the model, as `hf_quantizer`, where save_pretrained asks it.
    """

    quantization_config: SpicerackConfig

    def __init__(self, quantization_config: SpicerackConfig, **_kwargs: object) -> None:
        super().__init__(quantization_config)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_kwargs: object) -> PreTrainedModel:
        """Called by transformers when the model is built on the meta device: it is changed in place."""
        self.quantization_config.prepare(model)
        return model

    def is_serializable(self) -> bool:
        """False, so that save_pretrained refuses: `spicerack.save` writes what can be read."""
        return False

    @property
    def is_trainable(self) -> bool:
        """True, because adapters on top of packed layers are."""
        return True


def config_and_class(
    config: Mapping[str, Any], folder: Path, *, trust_remote_code: bool = False
) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """transformers' config object and model class for the config.json of a float model.

    config: what is in that file. folder: where it lies, for errors and for code. Code that came with the model is used
    only where transformers itself does not know the architecture, and only if it is trusted. Raises UntrustedCodeError
    (there is code, and it is not trusted), CheckpointError (an architecture that nobody here knows, a damaged config).
    """
    model_type = config.get("model_type")
    declared = config.get("architectures")
    names = [name for name in declared if isinstance(name, str)] if isinstance(declared, list) else []
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        try:
            built = CONFIG_MAPPING[model_type].from_dict(harmless(dict(config)))
        except (ArithmeticError, AttributeError, LookupError, StrictDataclassError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{folder / 'config.json'}: {error}", "the file is damaged, or newer than transformers"
            ) from error
        known = getattr(transformers, names[0], None) if names else None
        if isinstance(known, type) and issubclass(known, PreTrainedModel):
            if (reason := stranger(known, built)) is not None:
                raise CheckpointError(f"{folder / 'config.json'}: {reason}", "is it the model's own?")
            return built, known
        if not names and type(built) in MODEL_MAPPING:
            return built, cast(type[PreTrainedModel], MODEL_MAPPING[type(built)])
    code = config.get("auto_map")
    if not isinstance(code, dict) or "AutoConfig" not in code:
        if "pretrained_cfg" in config and isinstance(config.get("architecture"), str):
            name = config["architecture"]
            raise CheckpointError(
                f"{folder} is a {name} of timm, which transformers does not know",
                f"build it and pass it: load(folder, into=timm.create_model({name!r}))",
            )
        raise CheckpointError(
            f"{folder}: transformers {transformers.__version__} does not know {names[:1] or model_type!r}",
            "update transformers, or build the module and pass it: load(folder, into=module)",
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
    """The same from code that lies in the folder and is trusted: it runs here.

    code: auto_map of the config, name -> file.class. A causal model comes before a masked one, and that before one
    without a head. Raises CheckpointError where no model class is named.
    """
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

    model_class   what is built; transformers' own, or of code that is trusted
    config    the model's, as `config_and_class` gives it with `model_class`
    tensors   by name, as in a checkpoint; `prepare` may take some away
    folder    that all this came from: for errors, and for the config of generation
    dtype     of the float parameters; None keeps what config.json says
    prepare   called before `tensors` are looked at; None if no layer is replaced

    Raises LoadError if a parameter stays without a value: transformers would only warn, and fill in random numbers.
    """
    try:
        with quiet():
            loaded: Any = model_class.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=dtype or "auto",
                quantization_config=None if prepare is None else _quantization(prepare),
                output_loading_info=True,
                use_safetensors=True,
                local_files_only=True,
            )
    except (RuntimeError, ValueError, AttributeError, LookupError, TypeError, AssertionError, ArithmeticError) as error:
        raise LoadError(
            f"{folder}: {model_class.__name__} cannot be filled: {error}", "is config.json the model's own?"
        ) from error
    model: PreTrainedModel = loaded[0]
    info: Mapping[str, Any] = loaded[1]
    if prepare is not None:
        _leave_quantizer(model)
    _check(info, folder, model_class)
    model.name_or_path = model.config._name_or_path = str(folder)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, RuntimeError, ValueError, AttributeError, KeyError, TypeError) as error:
            raise LoadError(
                f"{folder}: generation_config.json is not understood: {error}", "fetch the file again, or remove it"
            ) from error
    return model, sorted(info["unexpected_keys"])


def _quantization(prepare: Prepare) -> SpicerackConfig:
    """The plug-in, entered into transformers' tables."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = SpicerackConfig
    AUTO_QUANTIZER_MAPPING[METHOD] = SpicerackQuantizer
    return SpicerackConfig(prepare)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars and reports, which it prints for every load, for the length of a `with` statement.

    Callers draw bars of their own, and what a report would say is raised.
    """
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
    """Raise LoadError for what transformers reports of a load and only warns of: parameters without a value, or of
    another shape, and errors."""
    for report, problem in (
        ("missing_keys", "has no value"),
        ("mismatched_keys", "has another shape"),
        ("error_msgs", "failed"),
    ):
        names = sorted(map(str, info[report]))
        if names:
            raise LoadError(
                f"{folder}: " + listed([f"{names[0]} of {model_class.__name__} {problem}", *names[1:]], 1),
                "the folder is incomplete, or its config.json names another architecture",
            )


def tell_transformers(model: PreTrainedModel) -> None:
    """Leave a model whose layers were packed in memory as `load` would: its config and ties are changed.

    What is packed is no parameter to tie any more, and save_pretrained refuses to write it. Without packed layers
    nothing happens.
    """
    if any(isinstance(layer, PackedLayer) for layer in model.modules()):
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        ties: dict[str, str] = model.all_tied_weights_keys
        model.all_tied_weights_keys = {a: b for a, b in ties.items() if a in parameters and b in parameters}
        _leave_quantizer(model)


def _leave_quantizer(model: PreTrainedModel) -> None:
    """Leave on a model, which is changed, what keeps it from save_pretrained, and nothing that the load needed."""
    _remove_marks(model)
    vars(model)["hf_quantizer"] = SpicerackQuantizer(SpicerackConfig(_nothing))


def _remove_marks(model: PreTrainedModel) -> None:
    """Take transformers' marks of a quantized model from it and from the configs of its parts, which are changed."""
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(mark, None)
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            for mark in ("quantization_config", "_is_quantized"):
                vars(part.config).pop(mark, None)


def tell_trainers(model: PreTrainedModel) -> None:
    """Leave a model whose packed layers were replaced as one that trains: not quantized, and with its ties.

    A model that never was quantized is not changed.
    """
    if "hf_quantizer" not in vars(model):
        return
    _remove_marks(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    ties: dict[str, str] = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.all_tied_weights_keys = {
        alias: owner
        for alias, owner in ties.items()
        if alias in parameters and parameters[alias] is parameters.get(owner)
    }


def _nothing(_model: PreTrainedModel) -> None:
    """`prepare` of a model whose layers are in place already."""
