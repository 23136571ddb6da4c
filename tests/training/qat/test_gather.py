"""What two processes train is frozen in one piece: sharded by FSDP2, and in DistributedDataParallel."""

from __future__ import annotations

from pathlib import Path

import processes
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import spicerack

SCRIPT = """
import os, sys, warnings, torch, spicerack
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from spicerack.numerics import codec
from spicerack.training.qat import gather
from spicerack.errors import UsageError
from spicerack.training.qat.fake_layers import FakeLayer
from test_gather import IDS, llama, net

rank, out = int(os.environ["RANK"]), sys.argv[1]
torch.distributed.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)


def step(model, inputs):
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    result = model(inputs)
    (result.logits if hasattr(result, "logits") else result).square().mean().backward()
    optimizer.step()


def evaluated(model, inputs):
    with torch.no_grad():
        result = model.eval()(inputs)
    return result.logits if hasattr(result, "logits") else result


def distributed(model):
    tables = [it for part in model.modules() for key, it in vars(part).items() if key.endswith("_hooks") and it]
    return [hook for table in tables for hook in table.values() if gather._is_distributed(hook)]


def check(name, model, inputs):
    for which in range(2):
        step(model, inputs[2 * which + rank])
    seen, handles = {}, []
    for path, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, FakeLayer):
            look = lambda layer, _, path=path: seen.update({path: layer.rounded_weight().detach().clone()})
            handles.append(layer.register_forward_pre_hook(look))
    expected = evaluated(model, inputs[0])
    for handle in handles:
        handle.remove()
    small = spicerack.freeze(model, compute="float")
    assert seen
    for path, weight in seen.items():
        layer = small.get_submodule(path)
        assert torch.equal(codec.decode(layer.packed.qtensor()), weight), (name, path)
    assert not any(isinstance(part, (FSDPModule, FakeLayer)) for part in small.modules())
    assert not any(isinstance(tensor, DTensor) for tensor in small.state_dict().values())
    assert distributed(model) and not distributed(small)
    assert not any(key.startswith("__composable") for part in small.modules() for key in vars(part))
    before = {key: value.clone() for key, value in small.state_dict().items()}
    found = evaluated(small, inputs[0])
    assert torch.allclose(found, expected, atol=5e-2 if name.endswith("a8") else 2e-6), name
    step(model.train(), inputs[0])  # it trains on, and the copy stays
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())
    if rank == 0:
        spicerack.save(small, f"{out}/{name}")
    torch.save((found, {key: value for key, value in before.items()}), f"{out}/{name}-{rank}.pt")


for scheme in ("w4g32z", "w2g32h", "ternary", "ternarya8"):
    model = spicerack.prepare_qat(net(), scheme)
    fully_shard(model[0])
    fully_shard(model)
    check(scheme, model, torch.randn(4, 16, 64, generator=torch.Generator().manual_seed(0)))

model = spicerack.prepare_qat(llama(), "w2g32", rules=["model.embed_tokens=w8"])
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
check("llama", model, IDS)

torch.manual_seed(0)
alone = spicerack.prepare_qat(nn.Linear(64, 7), "w4")
fully_shard(alone)
assert type(spicerack.freeze(alone)).__name__ == "QLinear"

inner = spicerack.prepare_qat(net(), "w4g32")
wrapped = DistributedDataParallel(inner)
small = spicerack.freeze(wrapped)
assert type(small) is nn.Sequential and list(small.state_dict()) == list(spicerack.freeze(inner).state_dict())

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    first = FullyShardedDataParallel(spicerack.prepare_qat(net(), "w4g32"), device_id=torch.device("cpu"))
other = spicerack.prepare_qat(net(), "w4g32")
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
other[0].weight = nn.Parameter(distribute_tensor(other[0].weight.detach(), mesh, [Shard(0)]))
for model, message in ((first, "one flat parameter"), (other, "0.weight is sharded over processes, and not by")):
    try:
        spicerack.freeze(model)
        raise AssertionError("frozen in pieces")
    except UsageError as error:
        assert message in str(error)
torch.distributed.destroy_process_group()
"""
IDS = torch.randint(1, 257, (4, 4, 12), generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    """Rows that two do not divide, biases, a norm, and buffers that do not move: each process has its own of these."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 96), nn.BatchNorm1d(96, momentum=0.0), nn.ReLU(), nn.Linear(96, 7), nn.LayerNorm(7)
    )


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=257, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


@pytest.mark.slow
def test_sharded_models_are_frozen_as_they_compute(tmp_path: Path) -> None:
    """Weights of an evaluating forward pass under FSDP2 bit for bit, on both processes, saved and loaded again."""
    both = [process.wait() for process in processes.pair(SCRIPT, [tmp_path], tmp_path)]
    assert [process.returncode for process in both] == [0, 0], "".join(process.stderr for process in both)
    for name in ("w4g32z", "w2g32h", "ternary", "ternarya8", "llama"):
        (output, state), (other, theirs) = (torch.load(tmp_path / f"{name}-{rank}.pt") for rank in (0, 1))
        assert torch.equal(output, other)
        assert state.keys() == theirs.keys() and all(torch.equal(state[key], theirs[key]) for key in state)
        with torch.no_grad():
            if name == "llama":
                loaded = spicerack.load(tmp_path / name, compute="float")
                assert type(loaded) is LlamaForCausalLM
                assert torch.equal(loaded(IDS[0]).logits, output)
            else:
                into = net().eval()
                x = torch.randn(4, 16, 64, generator=torch.Generator().manual_seed(0))[0]
                assert torch.equal(spicerack.load(tmp_path / name, into=into, compute="float")(x), output)
