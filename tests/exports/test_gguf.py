"""GGUF out and in, of every family: names, configs, floats, codes; gguf-py, transformers and llama.cpp read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from ggufs import ENCODERS, FAMILIES, folder, written
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import spicerack
from spicerack.exports.export import export
from spicerack.models.gguf import config as configs
from spicerack.models.gguf.checkpoint import GgufCheckpoint
from spicerack.models.gguf.family import of_type
from spicerack.models.gguf.names import Names, Place
from spicerack.numerics import codec
from spicerack.runtime.folder import Folder
from spicerack.storage.reader import Checkpoint
from spicerack.text.tokenizer import read_tokenizer

IDS = [5, 60, 77, 8, 99, 110, 211, 122, 33, 44, 155, 66, 77, 188, 29, 210, 3, 41, 52, 63]


def named(checkpoint: GgufCheckpoint, name: str) -> str:
    """What a tensor of a folder is called in the checkpoint of a file."""
    place, *_ = Names(checkpoint.family).places(name)
    return next(
        own
        for own, (other, *_) in checkpoint.places.items()
        if (other.tensor, other.member) == (place.tensor, place.member)
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def file(family: str) -> Path:
        if family not in made:
            made[family] = written(
                folder(family), tmp_path_factory.mktemp("gguf") / f"tiny{FAMILIES.index(family)}.gguf"
            )
        return made[family]

    return file


@pytest.mark.parametrize("family", FAMILIES)
def test_what_goes_out_comes_in(family: str, files: Any) -> None:
    """The config is the same, as transformers understands it, and so is every float."""
    source, checkpoint = Checkpoint.open(folder(family)), GgufCheckpoint.open(files(family))
    before, after = configs.whole(source.config), configs.whole(checkpoint.config)
    derived = {"no_rope_layers"}  # of as many layers as there are, or of more
    derived |= {"bos_token_id", "eos_token_id", "pad_token_id"}  # the tokenizer's count, and tiny configs have others
    derived |= {"num_kv_heads"} if family == "falcon" else set()  # which one head for all does not read
    assert {k: v for k, v in before.items() if k not in derived} == {k: v for k, v in after.items() if k not in derived}
    for name in source.tensors:
        stored = source.read(name)
        if family == "nomic_bert" and "Wqkv" in name:  # a checkpoint has these apart
            parts = [name.replace("encoder.", "").replace("attn.Wqkv", f"self_attn.{p}_proj") for p in "qkv"]
            assert torch.equal(torch.cat([checkpoint.read(part) for part in parts]), stored)
            continue
        read = checkpoint.read(named(checkpoint, name))
        if checkpoint.family.plus_one and name.endswith("norm.weight"):
            assert torch.equal(read + 1, stored + 1)  # all that anybody multiplies by
        else:
            assert torch.equal(read, stored), name
    assert len(checkpoint.tensors) >= len(source.tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_those_of_llama_cpp(family: str) -> None:
    """As gguf's own map has them."""
    of = of_type(family)
    architecture = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == of.architecture)
    theirs = gguf.get_tensor_name_map(architecture, 4)
    names = Names(of)
    compared = 0
    placed = [(name, names.places(name)) for name in Checkpoint.open(folder(family)).tensors]
    assert all(places for _, places in placed)
    for name, place in [pair for own, places in placed for pair in renamed(own, places)]:
        merged = name.replace("block_sparse_moe.experts", "feed_forward.experts").removeprefix("model.")
        single = (
            name
            if place.member is None
            else ".".join(p for i, p in enumerate(merged.split(".")) if not p.isdecimal() or i == 1)
        )
        single = single if place.member is None or family == "mixtral" else f"model.{single}"
        known = theirs.get_name(single, try_suffixes=(".weight", ".bias"))
        if name.startswith("pooler"):
            assert (known, place.module) == (None, "cls")  # llama.cpp's converter leaves it out
            continue
        assert known == place.tensor, name
        compared += 1
    assert compared > 10


MERGED = {
    "block_sparse_moe.input_linear": "mlp.experts.gate_up_proj",
    "shared_mlp.input_linear": "mlp.shared_expert.gate_up_proj", "feed_forward.experts": "mlp.experts",
}  # fmt: skip
"""Two matrices in one, which gguf's map does not know: what they are called in families that it knows them of."""


def renamed(name: str, places: tuple[Place, ...]) -> list[tuple[str, Place]]:
    """What llama.cpp's converter calls a tensor, and each of its shares, before it asks gguf's map."""
    (place, *_), last = places, places[0].tensor.rpartition(".")[2]
    if name.endswith("sinks"):
        return [(f"{name}.weight", place)]
    if place.share is None and not name.endswith(("down_proj", "down_proj_bias")):
        return [(name, place)]
    stem = name.removesuffix("_bias").removesuffix(".weight")
    for merged, known in MERGED.items():
        stem = stem.replace(merged, known)
    parts = [stem] if len(places) == 1 else [stem.replace("gate_up", part) for part in ("gate", "up")]
    return [(f"{part}.{last}", own) for part, own in zip(parts, places, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_codes_go_out_and_come_in(family: str, tmp_path: Path) -> None:
    """Quantized layers are the same QTensors, and gguf-py reads the weights that they stand for."""
    spicerack.quantize(folder(family), "w4g32", output=tmp_path / "q", fit_groups=True)
    result = export(tmp_path / "q", to="gguf", output=tmp_path / "tiny.gguf")
    assert result.verified_by.startswith("gguf-py") and not result.rounded
    before, after = Folder.open(tmp_path / "q"), Folder.open(tmp_path / "tiny.gguf")
    assert isinstance(after.checkpoint, GgufCheckpoint)
    assert len(before.contents) > 5
    for module, stored in before.contents.items():
        q = before.packed(stored)
        r = after.packed(after.contents[named(after.checkpoint, f"{module}.weight").removesuffix(".weight")])
        assert (r.scheme, r.transposed) == (q.scheme, q.transposed)
        assert torch.equal(r.codes, q.codes) and torch.equal(r.plain_scale, q.plain_scale)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ENCODERS])
def test_a_file_runs_as_its_folder_does(family: str, tmp_path: Path) -> None:
    """`load` of a quantized file computes bit for bit what `load` of the folder does."""
    spicerack.quantize(folder(family), "w8g32", output=tmp_path / "q")
    spicerack.load(tmp_path / "q")
    models = [spicerack.load(written(tmp_path / "q", tmp_path / "tiny.gguf")), spicerack.load(tmp_path / "q")]
    a, b = (model(input_ids=torch.tensor([IDS])).logits for model in models)
    assert torch.equal(a, b)


READ_BY_TRANSFORMERS = (
    "llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "qwen2_moe", "qwen3_moe", "gpt2", "falcon",
    "starcoder2", "stablelm",
)  # fmt: skip
"""Of gpt-oss transformers 5.24 takes the length of a key for its value."""


@pytest.mark.parametrize("family", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_weights(family: str, tmp_path: Path) -> None:
    """What transformers' own reader makes of a quantized file are the weights that our codes stand for, exactly."""
    spicerack.quantize(folder(family), "w4g32", output=tmp_path / "q", fit_groups=True)
    written(tmp_path / "q", tmp_path / "tiny.gguf")
    config = AutoConfig.from_pretrained(folder(family))  # of which it reads a part, and takes head_dim for another
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", config=config, dtype=torch.float32
    ).state_dict()
    ours = dense(tmp_path / "q", folder(family), tmp_path / "dense").state_dict()
    for name, tensor in ours.items():
        if "norm" in name and of_type(family).plus_one:
            assert torch.equal(theirs[name] + 1, tensor + 1)
        else:
            assert torch.equal(theirs[name], tensor), name


def dense(quantized: Path, original: Path, place: Path) -> PreTrainedModel:
    """The float model whose weights are those that the codes of a folder stand for."""
    opened = Folder.open(quantized)
    tensors = dict(opened.floats())
    for module, stored in opened.contents.items():
        name = module if stored.role == "experts" else f"{module}.weight"
        tensors[name] = codec.decode(opened.packed(stored))
    place.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, place / "model.safetensors")
    (place / "config.json").write_text((original / "config.json").read_text())
    return AutoModelForCausalLM.from_pretrained(place)


# ---- llama.cpp -------------------------------------------------------------------------------------------------------

TOLERANCE = 1e-3
"""Of log-probabilities: llama.cpp keeps keys and values in float16. Measured: 0.00028 at most, of 23 families."""


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ENCODERS])
def test_llama_cpp_computes_the_same(family: str, files: Any) -> None:
    server = llama_cpp(files(family))
    with torch.no_grad():
        logits = spicerack.load(folder(family))(input_ids=torch.tensor([IDS])).logits[0]
    ours, compared = torch.log_softmax(logits.float(), -1), 0
    for length in (4, 9, 13, 17, 20):
        answer = server.handle_completions({"prompt": IDS[:length], "n_predict": 1, "temperature": 0, "n_probs": 10})
        told = answer["choices"][0]["logprobs"]
        for one in told["content"][0]["top_logprobs"] if told else ():  # none for a token that is no whole character
            # of a mixture two experts may be nearly alike, and another one is asked
            tolerance = 0.05 if family == "mixtral" else TOLERANCE
            assert abs(one["logprob"] - float(ours[length - 1][one["id"]])) < tolerance
            compared += 1
    assert compared >= 10


@pytest.mark.slow
@pytest.mark.parametrize("family", ENCODERS)
def test_llama_cpp_embeds_the_same(family: str, files: Any) -> None:
    server = llama_cpp(files(family), embedding=True)
    answer = server.handle_embeddings({"input": IDS})
    theirs = torch.tensor(answer["data"][0]["embedding"])
    with torch.no_grad():
        ours = spicerack.load(folder(family))(input_ids=torch.tensor([IDS])).last_hidden_state[0].mean(0)
    assert torch.allclose(theirs / theirs.norm(), ours / ours.norm(), atol=2e-4)


def llama_cpp(file: Path, *, embedding: bool = False) -> Any:
    """A server of llama.cpp with the model in a file."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.warmup, params.n_ctx, params.n_parallel = str(file), False, 128, 1
    params.cpuparams.n_threads = 1
    if embedding:
        params.embedding, params.n_batch, params.n_ubatch = True, 128, 128
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    return xllamacpp.Server(params)


TIE = 1e-3
"""Of logits that are nearly alike, either engine may take either token."""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "prompt"), [("stdlib_lm", "def read(path):"), ("stories", "Once upon a time")])
def test_llama_cpp_writes_the_same_text(name: str, prompt: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """40 tokens, the likeliest each, from one file in llama.cpp and here, up to ties. In float: to layers in w4g32
    llama.cpp gives inputs in eight bits, and here they are floats."""
    file = written(request.getfixturevalue(name), tmp_path / "model.gguf")
    told = llama_cpp(file).handle_completions({"prompt": prompt, "n_predict": 40, "temperature": 0, "n_probs": 1})
    theirs = [one["id"] for one in told["choices"][0]["logprobs"]["content"]]
    loaded = spicerack.load(file)
    ids = read_tokenizer(file, loaded.config)(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = loaded(input_ids=torch.cat([ids, torch.tensor([theirs])], 1)).logits[0, ids.shape[1] - 1 : -1].float()
    assert len(theirs) == 40
    assert float((logits.amax(-1) - logits.gather(1, torch.tensor(theirs)[:, None])[:, 0]).max()) < TIE
