"""The parts that blocks of language models are made of, as the tensors that checkpoints have for them.

A part is called with config.json, the number of its layer and the prefix of the layer's names, which ends with a dot.
Experts are listed once with their number: a model of 671 B has 44,544 expert matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from spicerack.planning.anatomy.fields import Fields


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a checkpoint, or several that are alike.

    name    of the first of them
    shape   as stored
    count   how many: experts of a layer
    """

    name: str
    shape: tuple[int, ...]
    count: int = 1


Part = Iterator[Tensor]
Block = Callable[[Fields, int, str], Part]
"""(config, number of the layer, prefix that ends with a dot) -> tensors."""


def linear(name: str, rows: int, columns: int, bias: bool = False, count: int = 1) -> Part:
    """A layer's weight, and its bias if it has one."""
    yield Tensor(f"{name}.weight", (rows, columns), count)
    if bias:
        yield Tensor(f"{name}.bias", (rows,), count)


def norm(name: str, width: int, bias: bool = False) -> Part:
    yield Tensor(f"{name}.weight", (width,))
    if bias:
        yield Tensor(f"{name}.bias", (width,))


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention.

    bias        of queries, keys and values: a field's name, or what is always so
    out_bias    of the output, the same
    norms       queries and keys have one: a field's name, or what is always so
    gated       queries bring a gate of their size along
    fused       queries, keys and values are one matrix
    sinks       heads have a logit of their own
    """

    bias: str | bool = "attention_bias"
    out_bias: str | bool = False
    norms: str | bool = False
    gated: bool = False
    fused: bool = False
    sinks: bool = False

    def __call__(self, c: Fields, _layer: int, prefix: str) -> Part:
        """Its tensors."""
        at, queries, keys = f"{prefix}self_attn.", c.heads * c.width, c.kv_heads * c.width
        bias, out_bias, norms = (
            value if isinstance(value, bool) else c.flag(value) for value in (self.bias, self.out_bias, self.norms)
        )
        if self.fused:
            yield from linear(f"{at}qkv_proj", queries + 2 * keys, c.hidden, bias)
        else:
            yield from linear(f"{at}q_proj", queries * (2 if self.gated else 1), c.hidden, bias)
            yield from linear(f"{at}k_proj", keys, c.hidden, bias)
            yield from linear(f"{at}v_proj", keys, c.hidden, bias)
        yield from linear(f"{at}o_proj", c.hidden, queries, out_bias)
        if norms:
            yield from norm(f"{at}q_norm", c.width)
            yield from norm(f"{at}k_norm", c.width)
        if self.sinks:
            yield Tensor(f"{at}sinks", (c.heads,))


def latent(c: Fields, _layer: int, prefix: str) -> Part:
    """Attention whose keys and values are read from one compressed vector (MLA; DeepSeek-V2, arXiv:2405.04434)."""
    at, rank, rope = f"{prefix}self_attn.", c.size("kv_lora_rank"), c.size("qk_rope_head_dim")
    nope, values = c.size("qk_nope_head_dim"), c.size("v_head_dim")
    if c.get("q_lora_rank"):
        yield from linear(f"{at}q_a_proj", c.size("q_lora_rank"), c.hidden)
        yield from norm(f"{at}q_a_layernorm", c.size("q_lora_rank"))
        yield from linear(f"{at}q_b_proj", c.heads * (nope + rope), c.size("q_lora_rank"))
    else:
        yield from linear(f"{at}q_proj", c.heads * (nope + rope), c.hidden)
    yield from linear(f"{at}kv_a_proj_with_mqa", rank + rope, c.hidden)
    yield from norm(f"{at}kv_a_layernorm", rank)
    yield from linear(f"{at}kv_b_proj", c.heads * (nope + values), rank)
    yield from linear(f"{at}o_proj", c.hidden, c.heads * values)


def gated_mlp(c: Fields, _layer: int, prefix: str) -> Part:
    """gate, up and down."""
    return gated(f"{prefix}mlp", c.hidden, c.inner, bias=c.flag("mlp_bias"))


def gated(at: str, hidden: int, inner: int, count: int = 1, bias: bool = False) -> Part:
    yield from linear(f"{at}.gate_proj", inner, hidden, bias, count)
    yield from linear(f"{at}.up_proj", inner, hidden, bias, count)
    yield from linear(f"{at}.down_proj", hidden, inner, bias, count)


def fused_mlp(c: Fields, _layer: int, prefix: str) -> Part:
    """gate and up in one matrix (Phi-3)."""
    yield from linear(f"{prefix}mlp.gate_up_proj", 2 * c.inner, c.hidden)
    yield from linear(f"{prefix}mlp.down_proj", c.hidden, c.inner)


def mixtral(c: Fields, _layer: int, prefix: str) -> Part:
    """A mixture under Mixtral's names."""
    at, experts = f"{prefix}block_sparse_moe", c.size("num_local_experts")
    yield from linear(f"{at}.gate", experts, c.hidden)
    yield from linear(f"{at}.experts.0.w1", c.inner, c.hidden, count=experts)
    yield from linear(f"{at}.experts.0.w2", c.hidden, c.inner, count=experts)
    yield from linear(f"{at}.experts.0.w3", c.inner, c.hidden, count=experts)


def qwen_mixture(c: Fields, layer: int, prefix: str) -> Part:
    """A mixture, some with an expert that all tokens use, behind a gate; dense in the layers that config.json names."""
    step = c.size("decoder_sparse_step", default=1)
    if layer in c.marks("mlp_only_layers") or (layer + 1) % step:
        yield from gated_mlp(c, layer, prefix)
        return
    at, experts = f"{prefix}mlp", c.size("num_experts")
    yield from linear(f"{at}.gate", experts, c.hidden)
    yield from gated(f"{at}.experts.0", c.hidden, c.size("moe_intermediate_size"), experts)
    if c.get("shared_expert_intermediate_size"):
        yield from gated(f"{at}.shared_expert", c.hidden, c.size("shared_expert_intermediate_size"))
        yield from linear(f"{at}.shared_expert_gate", 1, c.hidden)


def stacked_qwen_mixture(c: Fields, _layer: int, prefix: str) -> Part:
    """The same with all experts of a layer in two tensors, as Qwen3.5 stores them."""
    at, experts, inner = f"{prefix}mlp", c.size("num_experts"), c.size("moe_intermediate_size")
    yield from linear(f"{at}.gate", experts, c.hidden)
    yield Tensor(f"{at}.experts.gate_up_proj", (experts, 2 * inner, c.hidden))
    yield Tensor(f"{at}.experts.down_proj", (experts, c.hidden, inner))
    yield from gated(f"{at}.shared_expert", c.hidden, c.size("shared_expert_intermediate_size"))
    yield from linear(f"{at}.shared_expert_gate", 1, c.hidden)


def deepseek_mixture(c: Fields, layer: int, prefix: str) -> Part:
    """A mixture behind the first dense layers, with experts that all tokens use.

    The router's correction bias is a buffer of the model and a tensor of the file.
    """
    if c.get("first_k_dense_replace") and layer < c.size("first_k_dense_replace"):
        yield from gated_mlp(c, layer, prefix)
        return
    at, experts, inner = f"{prefix}mlp", c.size("n_routed_experts"), c.size("moe_intermediate_size")
    yield from linear(f"{at}.gate", experts, c.hidden)
    yield Tensor(f"{at}.gate.e_score_correction_bias", (experts,))
    yield from gated(f"{at}.experts.0", c.hidden, inner, experts)
    if c.get("n_shared_experts"):
        yield from gated(f"{at}.shared_experts", c.hidden, inner * c.size("n_shared_experts"))


def gpt_oss_mixture(c: Fields, _layer: int, prefix: str) -> Part:
    """All experts in one tensor, stored [experts, in, out], with biases."""
    at, experts = f"{prefix}mlp", c.size("num_local_experts", "num_experts")
    yield from linear(f"{at}.router", experts, c.hidden, bias=True)
    yield Tensor(f"{at}.experts.gate_up_proj", (experts, c.hidden, 2 * c.inner))
    yield Tensor(f"{at}.experts.gate_up_proj_bias", (experts, 2 * c.inner))
    yield Tensor(f"{at}.experts.down_proj", (experts, c.inner, c.hidden))
    yield Tensor(f"{at}.experts.down_proj_bias", (experts, c.hidden))


def llama4_mixture(c: Fields, layer: int, prefix: str) -> Part:
    """All experts in one tensor, stored [experts, in, out], and one that all tokens use."""
    step = c.size("interleave_moe_layer_step", default=1)
    at = f"{prefix}feed_forward"
    if (layer + 1) % step:
        yield from gated(at, c.hidden, c.size("intermediate_size_mlp"))
        return
    experts = c.size("num_local_experts")
    yield from linear(f"{at}.router", experts, c.hidden)
    yield Tensor(f"{at}.experts.gate_up_proj", (experts, c.hidden, 2 * c.inner))
    yield Tensor(f"{at}.experts.down_proj", (experts, c.inner, c.hidden))
    yield from gated(f"{at}.shared_expert", c.hidden, c.inner)


def granite_mixture(c: Fields, _layer: int, prefix: str) -> Part:
    """All experts in one tensor, if there are any, and an MLP that all tokens use."""
    if c.get("num_local_experts"):
        at, experts = f"{prefix}block_sparse_moe", c.size("num_local_experts")
        yield Tensor(f"{at}.input_linear.weight", (experts, 2 * c.inner, c.hidden))
        yield Tensor(f"{at}.output_linear.weight", (experts, c.hidden, c.inner))
        yield from linear(f"{at}.router.layer", experts, c.hidden)
    shared = c.size("shared_intermediate_size")
    yield from linear(f"{prefix}shared_mlp.input_linear", 2 * shared, c.hidden)
    yield from linear(f"{prefix}shared_mlp.output_linear", c.hidden, shared)


@dataclass(frozen=True, slots=True)
class DeltaNet:
    """Linear attention with a gated delta rule (arXiv:2412.06464). fused: q, k, v and z are one matrix, b and a one."""

    fused: bool

    def __call__(self, c: Fields, _layer: int, prefix: str) -> Part:
        """Its tensors."""
        at = f"{prefix}linear_attn."
        keys = c.size("linear_num_key_heads") * c.size("linear_key_head_dim")
        heads = c.size("linear_num_value_heads")
        values = heads * c.size("linear_value_head_dim")
        yield Tensor(f"{at}dt_bias", (heads,))
        yield Tensor(f"{at}A_log", (heads,))
        yield Tensor(f"{at}conv1d.weight", (2 * keys + values, 1, c.size("linear_conv_kernel_dim")))
        if self.fused:
            yield from linear(f"{at}in_proj_qkvz", 2 * keys + 2 * values, c.hidden)
            yield from linear(f"{at}in_proj_ba", 2 * heads, c.hidden)
        else:
            yield from linear(f"{at}in_proj_qkv", 2 * keys + values, c.hidden)
            yield from linear(f"{at}in_proj_z", values, c.hidden)
            yield from linear(f"{at}in_proj_b", heads, c.hidden)
            yield from linear(f"{at}in_proj_a", heads, c.hidden)
        yield from norm(f"{at}norm", c.size("linear_value_head_dim"))
        yield from linear(f"{at}out_proj", c.hidden, values)


def mamba2(c: Fields, _layer: int, prefix: str) -> Part:
    """A state space with a scalar for each head (Mamba-2, arXiv:2405.21060)."""
    at, heads = f"{prefix}mamba.", c.size("mamba_n_heads")
    inner = c.size("mamba_expand", default=2) * c.hidden
    convolved = inner + 2 * c.size("mamba_n_groups", default=1) * c.size("mamba_d_state")
    bias = c.flag("mamba_proj_bias")
    for name in ("dt_bias", "A_log", "D"):
        yield Tensor(f"{at}{name}", (heads,))
    yield Tensor(f"{at}conv1d.weight", (convolved, 1, c.size("mamba_d_conv")))
    if c.flag("mamba_conv_bias", default=True):
        yield Tensor(f"{at}conv1d.bias", (convolved,))
    yield from linear(f"{at}in_proj", inner + convolved + heads, c.hidden, bias)
    yield from norm(f"{at}norm", inner)
    yield from linear(f"{at}out_proj", c.hidden, inner, bias)


def mamba1(c: Fields, _layer: int, prefix: str) -> Part:
    """A selective state space (Mamba, arXiv:2312.00752)."""
    at, inner, state = f"{prefix}mixer.", c.size("intermediate_size"), c.size("state_size")
    rank = c.size("time_step_rank")
    yield Tensor(f"{at}A_log", (inner, state))
    yield Tensor(f"{at}D", (inner,))
    yield Tensor(f"{at}conv1d.weight", (inner, 1, c.size("conv_kernel")))
    if c.flag("use_conv_bias", default=True):
        yield Tensor(f"{at}conv1d.bias", (inner,))
    bias = c.flag("use_bias")
    yield from linear(f"{at}in_proj", 2 * inner, c.hidden, bias)
    yield from linear(f"{at}x_proj", rank + 2 * state, inner)
    yield from linear(f"{at}dt_proj", inner, rank, bias=True)
    yield from linear(f"{at}out_proj", c.hidden, inner, bias)
