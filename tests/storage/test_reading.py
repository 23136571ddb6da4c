"""What config.json tells those who read a folder: names that theirs match, and how transformers must load it.

The oracle of names is compressed-tensors' own matching, against the modules of transformers' model; that of loading is
transformers, in `tests/models/test_sweep.py`, which asks it of all families.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from torch import nn

from spicerack.models.architecture import host_of, modules_of, on_meta
from spicerack.quantization.job import Job, prepare
from spicerack.quantization.recipe import decided, of
from spicerack.storage import format
from spicerack.storage.reader import Checkpoint


def job_of(family: str, tmp_path: Path, scheme: str, rules: tuple[str, ...] = ()) -> Job:
    """Decided, and not run."""
    tiny.build(family).save_pretrained(tmp_path / family)
    return prepare(tmp_path / family, decided(of(scheme, rules), with_text=False))


def section(job: Job) -> dict[str, Any]:
    """What its config.json says of quantization."""
    told: dict[str, Any] = job.config["quantization_config"]
    return told


@pytest.mark.parametrize(
    ("family", "rules"),
    [
        ("gpt_neox", ()),  # embed_out in the checkpoint is lm_head in the model
        ("gpt_neox", ("**.dense=w8",)),
        ("llava", ()),  # the language model is renamed, and its head
        ("llava", ("**.down_proj=w8",)),
        ("qwen2_vl", ("**.down_proj=w8",)),  # packed layers are renamed
        ("vit", ("**.output.dense=w8",)),
        ("sarvam_moe", ()),  # q, k and v of the model are one matrix in the checkpoint, which stays in float
        ("falcon", ("**.dense=skip",)),  # of a class that is derived from Linear
    ],
)
def test_names_are_those_that_others_match(family: str, rules: tuple[str, ...], tmp_path: Path) -> None:
    match = pytest.importorskip("compressed_tensors.utils.match")
    job = job_of(family, tmp_path, "w4g32", rules)
    contents = {a.stored.module: a.stored for a in job.actions if a.stored is not None}
    headers = {name: (info.dtype, info.shape) for name, info in job.source.tensors.items()}
    host = host_of(job.source.config, headers, contents, [])
    assert host.model is not None and job.format.name == "compressed_tensors"
    groups, ignored = section(job)["config_groups"].values(), section(job)["ignore"]
    matched: dict[str, int] = {}
    for group in groups:
        for path, layer in match.match_named_modules(host.model, group["targets"], ignored):
            if not isinstance(layer, nn.Linear | nn.Embedding):
                continue  # as compressed-tensors does: an activation in a Sequential, say
            assert path not in matched, "each layer has one scheme"
            matched[path] = group["weights"]["num_bits"]
    assert matched == {path: contents[module].scheme.bits for module, path in host.paths.items()}
    if len(groups) > 1:  # vLLM asks for the checkpoint's names
        targets = [target for group in groups for target in group["targets"]]
        assert all(any(match.match_name(module, target) for target in targets) for module in contents)


@pytest.mark.parametrize(
    ("family", "scheme", "rules", "decodes"),
    [
        ("t5", "w8", (), True),  # initialisers look at weights, which are not there while they are packed
        ("mamba", "w8", (), True),
        ("falcon", "w4", (), True),
        ("neomme", "w8a8", (), True),  # a float layer is tied to one whose codes are called `weight`
        ("zamba", "w8a8", (), True),
        ("t5", "w8a8", (), False),  # int8 weights are called `weight`
        ("llama", "w4g32", (), False),
        ("mixtral", "w4g32", (), False),
    ],
)
def test_transformers_decodes_where_it_must(
    family: str, scheme: str, rules: tuple[str, ...], decodes: bool, tmp_path: Path
) -> None:
    job = job_of(family, tmp_path, scheme, rules)
    assert section(job).get("dequantize", False) is decodes
    assert not any("transformers does not" in note for note in job.notes)


@pytest.mark.parametrize(
    ("family", "scheme", "rules", "reason"),
    [
        ("t5", "w4g32", ("**.q=w8",), "no attribute 'weight'"),
        ("mixtral", "w8a8", (), "conversion"),
        ("mixtral", "w4g32", ("**.w2=w8",), "one scheme for all experts"),
        ("mixtral", "w4g32", ("**.experts.**=skip",), "conversion"),  # experts in float are dropped while it loads
        ("dinov2", "w8", (), "source keys"),
    ],
)
def test_what_transformers_cannot_load_is_said_before_work(
    family: str, scheme: str, rules: tuple[str, ...], reason: str, tmp_path: Path
) -> None:
    [note] = [note for note in job_of(family, tmp_path, scheme, rules).notes if "transformers does not" in note]
    assert reason in note


def test_experts_of_one_scheme_may_differ_from_the_rest(tmp_path: Path) -> None:
    """transformers takes the first group that names experts for all of them: it comes first."""
    job = job_of("mixtral", tmp_path, "w4g32", ("**.self_attn.*=w8",))
    first = next(iter(section(job)["config_groups"].values()))
    assert all("experts" in target for target in first["targets"]) and first["weights"]["num_bits"] == 4
    assert not any("transformers does not" in note for note in job.notes)


def test_rehearsing_changes_nothing(tmp_path: Path) -> None:
    job = job_of("t5", tmp_path, "w8")
    model = on_meta(job.source.config)
    assert model is on_meta(job.source.config) and hasattr(model.encoder.block[0].layer[0].SelfAttention.q, "weight")


def test_lists_come_in_the_models_order(tmp_path: Path) -> None:
    """Not in that of a set, which changes with the hash seed: parameters that no tensor reaches are listed, too."""
    model = tiny.build("hrm_text")
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    listed = list(modules_of(checkpoint.config, checkpoint.tensors) or {})
    behind = [name for name in listed if f"{name}.weight" not in checkpoint.tensors and name not in checkpoint.tensors]
    order = [name.removesuffix(".weight") for name in model.state_dict()]
    assert len(behind) > 1 and behind == sorted(behind, key=order.index)


def test_a_format_without_readers_is_told_nothing(tmp_path: Path) -> None:
    job = job_of("llama", tmp_path, "w2g32h")
    assert job.format.name == "spicerack"
    assert job.format.reading({}, {}, format.Host(["lm_head"])) == format.Reading()
    json.dumps(dict(job.config))
