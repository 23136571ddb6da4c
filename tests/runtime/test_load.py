"""Loading: the ordinary model, equal to one with decoded weights; packed in memory; never random, never untrusted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import families
import pytest
import torch
from dense import decoded_model, logits
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, LlamaForCausalLM, PreTrainedModel

import spicerack
from spicerack.errors import CheckpointError, LoadError, UntrustedCodeError
from spicerack.nn.embedding import QEmbedding
from spicerack.nn.experts import ExpertStack
from spicerack.nn.linear import QConv1D, QLinear
from spicerack.nn.weight import PackedWeight
from spicerack.numerics import codec
from spicerack.numerics.scheme import parse
from spicerack.runtime.slots import Slot, StackSlot
from spicerack.storage import format

pytestmark = pytest.mark.usefixtures("reference_kernel")

IDS = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(0))
SCHEMES = ["w8", "w6", "w4g32", "w4g32z", "w3g64", "w2g32h", "w2g32z", "w8t", "w8z"]


def packed_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Those of a stack of experts are in the stack."""
    kinds = (QLinear, QConv1D, QEmbedding, ExpertStack)
    layers = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, kinds)}
    stacks = tuple(f"{name}." for name, m in layers.items() if isinstance(m, ExpertStack))
    return {name: m for name, m in layers.items() if not name.startswith(stacks)}


def decoded(stack: ExpertStack) -> torch.Tensor:
    """The parameter that it stands for."""
    experts = [torch.cat([part.weight for part in stack.parts(e)]) for e in range(len(stack))]
    return torch.stack([expert.t() if stack.transposed else expert for expert in experts])


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, under all their names."""
    return dict(
        [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)],
    )


def assert_same_model(model: PreTrainedModel, dense: PreTrainedModel) -> None:
    """Every parameter, packed or not, and every buffer, persistent or not."""
    layers = packed_layers(model)
    for name, layer in layers.items():
        if isinstance(layer, ExpertStack):
            assert torch.equal(decoded(layer), dense.get_parameter(name)), name
        else:
            assert torch.equal(layer.weight, dense.get_submodule(name).weight), name
    modules = model.named_modules(remove_duplicate=False)
    inside = tuple(f"{name}." for name, module in modules if isinstance(module, (PackedWeight, ExpertStack)))
    rest = {name: tensor for name, tensor in tensors_of(model).items() if not name.startswith(inside)}
    theirs = tensors_of(dense)
    packed = {name if isinstance(layer, ExpertStack) else f"{name}.weight" for name, layer in layers.items()}
    assert rest.keys() == theirs.keys() - packed
    for name, tensor in rest.items():
        assert torch.equal(tensor, theirs[name]) and tensor.dtype == theirs[name].dtype, name


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_loads(family: str, tmp_path: Path) -> None:
    source = families.build(family)
    source.save_pretrained(tmp_path / "model")
    spicerack.quantize(tmp_path / "model", "w8", output=tmp_path / "out", range_="absmax")
    model = spicerack.load(tmp_path / "out")
    dense = decoded_model(type(source), tmp_path / "out", tmp_path / "dense")
    assert packed_layers(model) and not any(isinstance(m, (Slot, StackSlot)) for m in model.modules())
    assert not model.training
    assert_same_model(model, dense)
    runs = (
        source.main_input_name == "input_ids"
        and family not in ("clip", "siglip", "dbrx")
        and not families.is_seq2seq(source)
    )
    if runs:
        assert torch.allclose(logits(model, IDS), logits(dense, IDS), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_equal_a_dense_model_with_the_decoded_weights(llama_folder, tmp_path: Path, scheme: str, dtype) -> None:
    spicerack.quantize(llama_folder(dtype=dtype), scheme, output=tmp_path / "out")
    model = spicerack.load(tmp_path / "out")
    dense = decoded_model(LlamaForCausalLM, tmp_path / "out", tmp_path / "dense")
    assert type(model) is LlamaForCausalLM and model.dtype == dtype
    assert torch.equal(logits(model, IDS), logits(dense, IDS))


def test_dtype_is_the_models_and_codes_stay(llama_folder, tmp_path: Path) -> None:
    spicerack.quantize(llama_folder(), "w4g32", output=tmp_path / "out")
    model = spicerack.load(tmp_path / "out", dtype=torch.bfloat16)
    decoded_model(LlamaForCausalLM, tmp_path / "out", tmp_path / "dense")
    dense = LlamaForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    assert torch.equal(logits(model, IDS), logits(dense, IDS))
    assert model.model.layers[0].mlp.up_proj.packed.tensors["scale"].dtype == torch.float16


@pytest.mark.parametrize("rule", ["lm_head=w8", "model.embed_tokens=w4g32z"])
def test_a_tied_head_and_embedding_share_one_storage(llama_folder, tmp_path: Path, rule: str) -> None:
    spicerack.quantize(llama_folder(tie_word_embeddings=True), "w4g32", output=tmp_path / "out", rules=[rule])
    model = spicerack.load(tmp_path / "out")
    assert isinstance(model.lm_head, QLinear) and isinstance(model.model.embed_tokens, QEmbedding)
    assert model.lm_head.packed is model.model.embed_tokens.packed
    assert_same_model(model, decoded_model(LlamaForCausalLM, tmp_path / "out", tmp_path / "dense"))


def test_a_tied_float_embedding_stays_tied(llama_folder, tmp_path: Path) -> None:
    spicerack.quantize(llama_folder(tie_word_embeddings=True), "w4g32", output=tmp_path / "out")
    model = spicerack.load(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("family", ["gpt_oss", "llama4", "granitemoe", "jetmoe", "mixtral", "deepseek_v3"])
def test_experts_run_packed(family: str, tmp_path: Path) -> None:
    """None of a mixture's expert matrices stays in float, in one tensor or in many."""
    families.build(family).save_pretrained(tmp_path / "model")
    spicerack.quantize(tmp_path / "model", "w4g8", output=tmp_path / "out")
    stacks = [m for m in spicerack.load(tmp_path / "out").modules() if isinstance(m, ExpertStack)]
    assert stacks and all(isinstance(part, QLinear) for s in stacks for e in range(len(s)) for part in s.parts(e))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_of_one_stack_may_differ(family: str, tmp_path: Path) -> None:
    source = families.build(family)
    source.save_pretrained(tmp_path / "model")
    last = "w2" if family == "mixtral" else "down_proj"
    rules = ["**.experts.1.**=w4g8", f"**.experts.2.{last}=skip"]
    spicerack.quantize(tmp_path / "model", "w8", output=tmp_path / "out", rules=rules)
    model = spicerack.load(tmp_path / "out")
    dense = decoded_model(type(source), tmp_path / "out", tmp_path / "dense")
    assert_same_model(model, dense)
    assert torch.allclose(logits(model, IDS), logits(dense, IDS), atol=1e-5)
    stacks = [m for m in packed_layers(model).values() if isinstance(m, ExpertStack)]
    assert {m.scheme.name for s in stacks for m in s.modules() if isinstance(m, PackedWeight)} == {"w8", "w4g8"}
    assert any(isinstance(m, torch.nn.Linear) for s in stacks for m in s.modules())


def test_generation_equals_the_dense_models(llama_folder, tmp_path: Path) -> None:
    spicerack.quantize(llama_folder(), "w4g32", output=tmp_path / "out")
    model = spicerack.load(tmp_path / "out")
    dense = decoded_model(LlamaForCausalLM, tmp_path / "out", tmp_path / "dense")
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 256}
    ids = IDS[:1]
    ours, theirs = (m.generate(ids, attention_mask=torch.ones_like(ids), **settings) for m in (model, dense))
    assert torch.equal(ours, theirs)


def test_gradients_reach_the_inputs_as_in_the_dense_model(llama_folder, tmp_path: Path) -> None:
    spicerack.quantize(llama_folder(), "w4g32", output=tmp_path / "out")
    models = [spicerack.load(tmp_path / "out"), decoded_model(LlamaForCausalLM, tmp_path / "out", tmp_path / "dense")]
    grads = []
    for model in models:
        x = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=x).logits.square().mean().backward()
        grads.append(x.grad)
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-7)


def test_the_real_small_model(stories: Path, tmp_path: Path) -> None:
    rules = ["**.down_proj=w8"]  # 172 inputs: no group of 32 fits
    spicerack.quantize(stories, "w4g32", output=tmp_path / "out", rules=rules)
    model = spicerack.load(tmp_path / "out")
    dense = decoded_model(LlamaForCausalLM, tmp_path / "out", tmp_path / "dense")
    assert torch.equal(logits(model, IDS), logits(dense, IDS))
    reference = spicerack.load(stories)
    assert torch.equal(logits(reference, IDS), logits(LlamaForCausalLM.from_pretrained(stories), IDS))


def test_state_dict_after_loading_can_be_loaded(llama_folder, tmp_path: Path) -> None:
    spicerack.quantize(llama_folder(), "w4g32z", output=tmp_path / "out")
    a, b = spicerack.load(tmp_path / "out"), spicerack.load(tmp_path / "out")
    nn.init.zeros_(b.model.norm.weight)
    b.load_state_dict(a.state_dict())
    assert torch.equal(logits(a, IDS), logits(b, IDS))


def test_save_pretrained_refuses_rather_than_write_what_nobody_reads(llama_folder, tmp_path: Path) -> None:
    spicerack.quantize(llama_folder(), "w8", output=tmp_path / "out")
    with pytest.raises(ValueError, match="not serializable"):
        spicerack.load(tmp_path / "out").save_pretrained(tmp_path / "again")


def test_a_sharded_folder_loads(llama_folder, tmp_path: Path) -> None:
    spicerack.quantize(llama_folder(), "w8", output=tmp_path / "out", shard_bytes=50_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    dense = decoded_model(LlamaForCausalLM, tmp_path / "out", tmp_path / "dense")
    assert torch.equal(logits(spicerack.load(tmp_path / "out"), IDS), logits(dense, IDS))


# ---- memory ----------------------------------------------------------------------------------------------------------

MEASURED = """
import sys, psutil, torch, transformers
from transformers import LlamaForCausalLM
import spicerack.runtime.load
from spicerack.kernels.table import reference
torch.set_num_threads(1)
torch.ones(64, 64) @ torch.ones(64, 64)
before = psutil.Process().memory_info().rss
model = spicerack.runtime.load.load(sys.argv[1])
loaded = psutil.Process().memory_info().rss - before
with torch.no_grad():
    model(torch.arange(4)[None])
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(loaded, psutil.Process().memory_info().rss - before, peak - before)
"""


@pytest.mark.slow
def test_weights_stay_packed_in_memory(tmp_path: Path) -> None:
    """Two layers of 2048 x 8192: 488 MB in float32, 63 MB in w4g128, 73 measured, 81 after a forward, 98 at most.

    Files are mapped, and their pages resident until they are packed: all of them would be 136.
    """
    config = AutoConfig.for_model("llama", hidden_size=2048, intermediate_size=8192, num_hidden_layers=2, vocab_size=64,
                                  num_attention_heads=16, num_key_value_heads=4)  # fmt: skip
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in LlamaForCausalLM(config).named_parameters()}
    contents, tensors, generator = {}, {}, torch.Generator().manual_seed(0)
    fmt, scheme = format.get("compressed_tensors"), parse("w4g128")
    for name, shape in shapes.items():
        if "proj" in name:
            module = name.removesuffix(".weight")
            contents[module] = format.StoredTensor(module, scheme, tuple(shape))
            small = codec.encode(torch.randn(16, shape[1], generator=generator) / 64, scheme, range_="absmax")
            packed = fmt.encode(format.StoredTensor(module, scheme, (16, shape[1])), small)
            for key, tensor in packed.items():
                tensors[key] = tensor.repeat(shape[0] // 16, 1) if tensor.ndim == 2 else torch.tensor(shape)
        else:
            tensors[name] = torch.ones(shape)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    raw = {**config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(fmt.config(raw, contents, format.Reading(["lm_head"]))))
    # A fixed threshold makes glibc return freed memory at once: asserted is what is held, not what malloc keeps.
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"},
    )
    assert done.returncode == 0, done.stderr
    loaded, after, peak = map(int, done.stdout.split())
    in_float = sum(torch.Size(s).numel() * 4 for s in shapes.values())
    assert in_float > 400e6
    assert loaded < 0.2 * in_float
    assert after < 0.22 * in_float
    assert peak < 0.25 * in_float


# ---- your own module -------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.body = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.LayerNorm(64), nn.Linear(64, 32))
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.body(self.table(ids)))
        return out


def net_folder(folder: Path, net: Net) -> Path:
    """As `spicerack.save` writes a module: the container without a model's config."""
    contents, tensors = {}, {n: t for n, t in net.state_dict().items() if n.endswith("bias") or n.startswith("body.2")}
    own = format.get("spicerack")
    for module, role in (("table", "embedding"), ("body.0", "linear"), ("body.3", "linear")):
        weight = net.get_submodule(module).weight.detach()
        contents[module] = format.StoredTensor(module, parse("w8"), tuple(weight.shape), role)
        tensors |= own.encode(contents[module], codec.encode(weight, parse("w8")))
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(own.config({}, contents, format.Reading())))
    return folder


def test_into_fills_your_own_module(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net()
    folder = net_folder(tmp_path / "net", net)
    filled = Net()
    assert spicerack.load(folder, into=filled) is filled
    assert filled.head.packed is filled.table.packed
    ids = torch.arange(50)
    assert (filled(ids) - net(ids)).norm() < 0.02 * net(ids).norm()
    with pytest.raises(CheckpointError, match="into=module"):
        spicerack.load(folder)


def test_into_another_module_is_refused(tmp_path: Path) -> None:
    folder = net_folder(tmp_path / "net", Net())
    other = Net()
    other.body[0] = nn.Linear(16, 64)
    with pytest.raises(LoadError, match=r"body.0: packed \[64, 32\], but body.0 is Linear \[64, 16\]"):
        spicerack.load(folder, into=other)
    other = Net()
    other.extra = nn.Linear(2, 2)
    with pytest.raises(LoadError, match=r"extra.weight, extra.bias has no value"):
        spicerack.load(folder, into=other)
    other = Net()
    other.body[2] = nn.Identity()
    with pytest.raises(LoadError, match=r"body.2.weight.* not in the module"):
        spicerack.load(folder, into=other)
    with pytest.raises(LoadError, match="no layer table"):
        spicerack.load(folder, into=nn.Linear(2, 2))


# ---- refusals --------------------------------------------------------------------------------------------------------


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_tensor(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_tensor_is_an_error_and_never_random(llama_folder, tmp_path: Path) -> None:
    model = llama_folder()
    spicerack.quantize(model, "w8", output=tmp_path / "out")
    for folder in (model, tmp_path / "out"):
        drop_tensor(folder, "model.norm.weight")
        with pytest.raises(LoadError, match=r"model.norm.weight of LlamaForCausalLM has no value"):
            spicerack.load(folder)


def test_a_role_that_is_not_known_is_an_error(tmp_path: Path) -> None:
    folder = net_folder(tmp_path / "net", Net())
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"embedding"', '"tablecloth"'))
    with pytest.raises(CheckpointError, match=r"table is packed as 'tablecloth', of which nothing is known"):
        spicerack.load(folder, into=Net())


def test_a_missing_packed_tensor_is_an_error(llama_folder, tmp_path: Path) -> None:
    spicerack.quantize(llama_folder(), "w4g32", output=tmp_path / "out")
    drop_tensor(tmp_path / "out", "model.layers.1.mlp.up_proj.weight_scale")
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.up_proj.weight_scale"):
        spicerack.load(tmp_path / "out")


def test_a_config_of_another_size_is_an_error(llama_folder, tmp_path: Path) -> None:
    spicerack.quantize(llama_folder(), "w4g32", output=tmp_path / "out")
    edit_config(tmp_path / "out", intermediate_size=160)
    with pytest.raises(LoadError, match=r"mlp.*packed \[.*128.*\], but .* Linear"):
        spicerack.load(tmp_path / "out")
    edit_config(tmp_path / "out", intermediate_size=128, num_hidden_layers=1)
    with pytest.raises(LoadError, match=r"layers.1.* has no use for it"):
        spicerack.load(tmp_path / "out")
    edit_config(tmp_path / "out", num_hidden_layers=3)
    with pytest.raises(LoadError, match=r"layers.2.*has no value"):
        spicerack.load(tmp_path / "out")


def test_tensors_without_use_are_said(llama_folder, tmp_path: Path) -> None:
    folder = llama_folder()
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"mtp.proj": torch.ones(3)}, folder / "model.safetensors", metadata={"format": "pt"})
    spicerack.quantize(folder, "w8", output=tmp_path / "out")
    with pytest.warns(UserWarning, match=r"LlamaForCausalLM has no use for mtp.proj"):
        spicerack.load(tmp_path / "out")


CODE = """
from pathlib import Path
Path(__file__).with_name("executed").touch()
from transformers import LlamaConfig, LlamaForCausalLM
class OddConfig(LlamaConfig):
    model_type = "odd"
class OddModel(LlamaForCausalLM):
    config_class = OddConfig
"""


@pytest.mark.parametrize("scheme", [None, "w8", "w2g32h"])
def test_code_that_came_with_a_model_runs_only_if_trusted(
    llama_folder, tmp_path: Path, scheme: str, monkeypatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = llama_folder()
    (folder / "odd.py").write_text(f"# {tmp_path}{CODE}")
    names = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddModel"}
    edit_config(folder, model_type="odd", architectures=["OddModel"], auto_map=names)
    if scheme is not None:
        rules = ["lm_head=skip"]
        spicerack.quantize(folder, scheme, output=tmp_path / "out", rules=rules)
        folder = tmp_path / "out"
    with pytest.raises(UntrustedCodeError, match="odd needs Python code"):
        spicerack.load(folder)
    assert not list(tmp_path.rglob("executed"))
    model = spicerack.load(folder, trust_remote_code=True)
    assert type(model).__name__ == "OddModel" and list(tmp_path.rglob("executed"))
    assert bool(packed_layers(model)) == (scheme is not None)


def test_unknown_architectures_are_named(llama_folder) -> None:
    folder = llama_folder()
    edit_config(folder, model_type="unheard_of", architectures=["UnheardOf"])
    with pytest.raises(CheckpointError, match=r"does not know \['UnheardOf'\]"):
        spicerack.load(folder)


def test_no_other_loader_mistakes_our_container(llama_folder, tmp_path: Path) -> None:
    spicerack.quantize(llama_folder(), "w2g32h", output=tmp_path / "out")
    with pytest.raises(ValueError, match="spicerack"):
        AutoModel.from_pretrained(tmp_path / "out")
