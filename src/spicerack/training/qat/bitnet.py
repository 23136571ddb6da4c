"""BitNet b1.58 twins: the config of a network to be trained with ternary weights, of a Llama's sizes.

    model = BitNetForCausalLM(spicerack.twin_config(LlamaConfig.from_pretrained("model")))
    model = spicerack.prepare_qat(model, "ternarya8")

What makes it one (Ma et al. 2024, arXiv:2402.17764, and the training tips that came with it): ternary weights scaled by
their mean magnitude and int8 activations, which `prepare_qat` makes; an RMS norm in front of the output and down
projections too (SubLN), and relu(x)^2 for the gate, which transformers' BitNet classes have.
"""

from __future__ import annotations

from transformers import BitNetConfig, LlamaConfig

from spicerack.arguments import checked
from spicerack.errors import UsageError

_SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id",
    "eos_token_id", "tie_word_embeddings", "attention_dropout", "rope_parameters", "dtype",
)  # fmt: skip
"""What a twin takes over from the Llama's config, under the same names."""


@checked
def twin_config(config: LlamaConfig, *, squared_relu: bool = True) -> BitNetConfig:
    """The config for transformers' BitNet classes, with SubLN; their parameters have a Llama's names and more norms.

    config: of a Llama; sizes, positions, tokens and types are taken from it. squared_relu: relu(x)^2 gates, as BitNet
    b1.58 2B4T has them, or the activation of `config`. Raises UsageError for what the BitNet classes lack.
    """
    if config.model_type != "llama":
        raise UsageError(f"a {config.model_type} has no BitNet twin", "start from a LlamaConfig")
    if config.attention_bias or config.mlp_bias:
        raise UsageError("BitNet has no biases", "attention_bias=False, mlp_bias=False")
    heads: int = config.num_attention_heads
    if config.head_dim and config.head_dim * heads != config.hidden_size:
        raise UsageError(
            f"{heads} heads of {config.head_dim} are not the hidden size {config.hidden_size}", "leave head_dim out"
        )
    activation = "relu2" if squared_relu else config.hidden_act
    return BitNetConfig(hidden_act=activation, **{name: getattr(config, name) for name in _SAME})
