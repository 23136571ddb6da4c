"""What is alive while a model computes, besides weights and cache: formulas that were compared with measurements.

transformers   the peak of live tensors of a forward without cache, on full-size models: exact to a tenth of a row of
               hidden channels, for dense models with gated MLPs
llama.cpp      its compute buffer with flash attention, as its own run without allocation reports it: 26 of 32 values
               within .12 MiB, the other six hold a row more, which is counted here always, so that no one is too small;
               a build without weights in an order of its own (CPU_REPACK) holds up to five rows less
"""

from __future__ import annotations

from spicerack.planning.model import Model


def forward(model: Model, tokens: int, nbytes: int, *, all_logits: bool = False) -> int:
    """Bytes of live tensors while a prompt of `tokens` runs through transformers' modules. nbytes: of a number.

    all_logits: those of every position are wanted, as for an evaluation; generation keeps one row.
    """
    hidden, inner = model.fields.hidden, _inner(model)
    fused = any(weight.entry.module.endswith("mlp.gate_up_proj") for weight in model.weights[:64])
    peak = 4 * hidden + (4 if fused else 3) * inner * model.chosen + (model.chosen - 1) * hidden
    head = model.fields.size("vocab_size", default=0x7FFF) + hidden
    return nbytes * (max(tokens * peak, tokens * head) if all_logits else max(tokens * peak, head))


def ours(model: Model, tokens: int) -> int:
    """Bytes that our runtime holds while a prompt of `tokens` runs, all of it at once.

    Between kernels activations are float32 whatever the files are: four rows of hidden channels (three of an encoder)
    and of an MLP's inner ones five where gate and up are one product, four where experts take turns, two without a
    gate; under MLA queries, keys and values unfolded; fourteen rows of the values of linear attention, which
    transformers computes in chunks. Fitted to the growth of resident memory of six models
    (`python -m benchmarks.planning.memory`).
    """
    fields = model.fields
    names = {weight.entry.module.rpartition(".")[2] for weight in model.weights}
    gated = bool(names & {"gate_proj", "gate_up_proj", "w3", "wi_1"})
    inner = (4 if model.experts else 5 if gated else 2) * _inner(model) * model.chosen
    mixed = 0
    if fields.get("kv_lora_rank"):
        wide = fields.size("qk_nope_head_dim") + fields.size("qk_rope_head_dim")
        mixed = fields.heads * (2 * wide + fields.size("v_head_dim"))
    elif fields.get("linear_num_value_heads"):
        mixed = 14 * fields.size("linear_num_value_heads") * fields.size("linear_value_head_dim")
    return 4 * tokens * ((4 if gated or model.experts else 3) * fields.hidden + inner + mixed)


def llama_cpp(model: Model, context: int, *, batch: int = 512, outputs: int | None = None) -> int:
    """Bytes of llama.cpp's compute buffer, one for each device, with flash attention.

    context: of a sequence, however many there are: a token looks at its own. batch: its ubatch. outputs: rows of
    logits; llama-server keeps one for each sequence, the other tools all (None).
    """
    fields, rows = model.fields, min(batch, context)
    hidden = fields.hidden
    row = 4 * rows * hidden
    windows = [layer.window for layer in model.layers if layer.window is not None]
    masked = context + (_up(min(context, max(windows) + rows)) if windows else 0)
    inner = _inner(model)
    middle = 4 * rows * model.chosen
    mlp = 3 * middle * inner + (middle * hidden if hidden > 2 * inner else 0)
    if fields.get("first_k_dense_replace"):
        mlp = max(mlp, 3 * 4 * rows * fields.inner)
    latent = 0
    if fields.get("kv_lora_rank"):
        rank, rope = fields.size("kv_lora_rank"), fields.size("qk_rope_head_dim")
        latent = 4 * rows * fields.heads * (2 * (rank + rope) + fields.size("qk_nope_head_dim") + rope)
    logits = 4 * min(rows, rows if outputs is None else outputs) * fields.vocabulary if model.generates else 0
    return 2 * rows * masked + 6 * row + max(mlp, latent, logits)


def _inner(model: Model) -> int:
    """Channels inside the MLP that a token runs through: one expert's, where there are experts."""
    fields = model.fields
    if model.experts and fields.get("moe_intermediate_size"):
        return fields.size("moe_intermediate_size")
    return fields.size("intermediate_size", "decoder_ffn_dim", "d_ff", "ffn_dim", "n_inner", default=4 * fields.hidden)


def _up(tokens: int) -> int:
    """The next multiple of 256, the cells that llama.cpp takes at a time."""
    return -(-tokens // 256) * 256
