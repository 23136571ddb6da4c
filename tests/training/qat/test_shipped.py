"""What a prepared model computes is what `freeze` ships, whatever way its forward takes to the numbers of a layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, T5Config, T5EncoderModel
from transformers.pytorch_utils import Conv1D

import spicerack

X = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(50, (3, 5), generator=torch.Generator().manual_seed(1))


class Head(nn.Module):
    """A language model whose head is the embedding's weight, which no layer multiplies by."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.layer = nn.Embedding(50, 64), nn.Linear(64, 64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.linear(self.layer(self.emb(ids)), self.emb.weight)


class Reads(nn.Module):
    """Multiplies by all kinds of layers' weights itself, in its own ways."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 96), Conv1D(64, 96), nn.Conv2d(1, 8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.einsum("btk,nk->btn", x, self.a.weight.to(x.dtype)) @ self.b.weight
        maps = F.conv2d(y.reshape(-1, 1, 8, 8), self.c.weight, self.c.bias)
        return maps.reshape(*x.shape[:-1], 8)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(64, 4, batch_first=True), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.out(self.attention(x, x, x, need_weights=False)[0])
        return y


def encoder(norm_first: bool = False) -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def t5() -> nn.Module:
    sizes = {"d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 96, "num_layers": 2}
    return T5EncoderModel(T5Config(vocab_size=50, dropout_rate=0, **sizes))


def bert() -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertModel(BertConfig(vocab_size=50, hidden_dropout_prob=0, attention_probs_dropout_prob=0, **sizes))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=64, n_layer=2, n_head=4, n_positions=16, bos_token_id=0,
                                      eos_token_id=0, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))  # fmt: skip


NETS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, tuple[str, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)), X, ()),
    "encoder": (encoder, X, ()),
    "encoder-first": (lambda: encoder(True), X, ()),
    "decoder": (lambda: Decoding(), X, ()),
    "attention": (Attends, X, ()),
    "head": (Head, IDS, ("emb=w2g32",)),
    "reads": (Reads, X, ("c=w4g8",)),
    "t5": (t5, IDS, ("shared=w4g32",)),
    "bert": (bert, IDS, ("embeddings.word_embeddings=w4g32",)),
    "gpt2": (gpt2, IDS, ("transformer.wte=w4g32",)),
}


class Decoding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(64, 4, 96, dropout=0.0, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x, x)
        return y


def result(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = model(x)
    y = y if isinstance(y, torch.Tensor) else y[0]
    return y.detach()


@pytest.mark.parametrize("scheme", ["w4g32", "w2g32h", "w4g32z", "w4g32a8", "ternary"])
@pytest.mark.parametrize("name", sorted(NETS))
@pytest.mark.filterwarnings("ignore:.*of the weights in matrices stay in float")  # attention of torch's own
def test_every_mode_computes_what_is_frozen(name: str, scheme: str) -> None:
    build, x, rules = NETS[name]
    if name == "reads" and scheme.endswith("a8"):
        pytest.skip("packed convolutions compute with float activations, and freeze says so")
    qat = spicerack.prepare_qat(build(), scheme, rules=rules)
    float_ = build()
    trained = {n: p for n, p in qat.state_dict().items() if n in float_.state_dict()}
    float_.load_state_dict(trained)
    shipped = result(spicerack.freeze(qat, compute="float").eval(), x)
    unrounded = result(float_.eval(), x)
    off = float((unrounded - shipped).norm())
    assert off > 0.01 * float(shipped.norm())
    for training in (True, False):
        for enter in (torch.no_grad, torch.enable_grad, torch.inference_mode):
            with enter():
                seen = result(qat.train(training), x)
            # int8 activations that fall on the other side of a border are a step off, of 1/127 of the token's largest
            assert float((seen - shipped).norm()) < (0.1 if scheme.endswith("a8") else 1e-3) * off, (training, enter)


def test_a_weight_that_is_read_learns() -> None:
    qat = spicerack.prepare_qat(Head(), "w4", rules=["emb=w2"])
    table = qat.get_submodule("emb")
    assert table.weight is dict(qat.named_parameters())["emb.weight"]
    qat(IDS).square().mean().backward()
    assert table.weight.grad is not None and (table.weight.grad != 0).any(1).sum() > len(IDS.unique())
    assert table.weight_scale.grad is not None and torch.isfinite(table.weight_scale.grad).all()  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_read_weight_is_compiled_rounded() -> None:
    qat = spicerack.prepare_qat(Head(), "w4", rules=["emb=w2"]).eval()
    with torch.no_grad():
        assert torch.allclose(torch.compile(qat, backend="eager")(IDS), qat(IDS), atol=1e-5)
