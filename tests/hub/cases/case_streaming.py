"""A Fisher read slice by slice over HTTP ranges: equal to the files bit by bit, at the price of exactly the slices' bytes."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training
from huggingface_hub import HfApi
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from server import Fault
from transformers import AutoModelForCausalLM

from hf_ewc.artifact import BaseModel, EstimatorRecord, FisherInformation, ProbeRecord
from hf_ewc.artifact.files import sha256_file
from hf_ewc.artifact.manifest import digest_of
from hf_ewc.artifact.remote import RemoteTensors
from hf_ewc.artifact.streamed import open_streamed
from hf_ewc.errors import FisherFormatError, HubError
from hf_ewc.hub import remote_files

LEGS = ("xet",)  # as in production; ranges go to the CDN in both

SHAPES = {"embed.weight": (1003, 300), "experts.weight": (5, 8, 130), "norm.weight": (300,), "head.weight": (77, 257)}
CODECS = ("float32", "bfloat16", "log8")
CONTENT = "GET /cdn/"
RANKS = 4


def make_fisher(base_folder: Path) -> FisherInformation:
    generator = torch.Generator().manual_seed(5)
    tensors = {
        name: (torch.randn(shape, generator=generator) * 3 - 10).exp() * (torch.rand(shape, generator=generator) > 0.05)
        for name, shape in SHAPES.items()
    }
    probe = ProbeRecord(kind="text", dataset="en.jsonl", split="train", ids_sha256="ab" * 32, examples=9, scored_tokens=1000)
    base, estimator = BaseModel.resolve(base_folder), EstimatorRecord(normalizer=50.0)
    return FisherInformation.from_tensors(tensors, base=base, probes=[probe], estimator=estimator)


@pytest.fixture
def folder(base_folder, tmp_path) -> Path:
    return make_fisher(base_folder).save_pretrained(tmp_path / "fisher", max_shard_size="650KB")


def push(folder: Path, name: str, **repo) -> str:
    HfApi().create_repo(name, repo_type="dataset", exist_ok=True, **repo)
    return HfApi().upload_folder(repo_id=name, repo_type="dataset", folder_path=folder).oid


def header_bytes(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def edit(folder: Path, change) -> None:
    """Change the manifest, and sign it again."""
    path = folder / "fisher_config.json"
    data = json.loads(path.read_text())
    change(data)
    data.pop("digest")
    data["digest"] = digest_of(data)
    path.write_text(json.dumps(data))


def rewrite(folder: Path, change) -> None:
    """Change the tensors of the last shard and make the manifest fit: only values are wrong."""
    path = max(folder.glob("fisher-*.safetensors"))
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    record = {"sha256": sha256_file(path), "size": path.stat().st_size}
    edit(folder, lambda data: data["storage"]["shards"].update({path.name: record}))


@pytest.mark.parametrize("codec", CODECS)
def test_slices_equal_local_reads_bit_by_bit(hub, name, base_folder, tmp_path, codec):
    folder = make_fisher(base_folder).save_pretrained(tmp_path / "fisher", codec=codec, max_shard_size="330KB")
    shards = sorted(folder.glob("fisher-*.safetensors"))
    assert len(shards) > 1
    commit = push(folder, name)
    local = FisherInformation.from_pretrained(folder)
    manifest, read, anchor = open_streamed(name, commit)
    assert manifest == local.manifest
    assert anchor is None
    listed = remote_files(name, "dataset", commit)
    files = RemoteTensors(listed[shard.name] for shard in shards)
    draw = random.Random(1)
    for parameter, shape in SHAPES.items():
        assert torch.equal(read(parameter, None), local.read(parameter))
        for _ in range(8):
            index = tuple(
                slice(*sorted(draw.choices(range(-1, size + 2), k=2)), draw.choice([None, 1, 2]))
                for size in shape[: draw.randint(1, len(shape))]
            )
            assert torch.equal(read(parameter, index), local.read(parameter, index)), (parameter, index)
            with safe_open(folder / files.home[parameter].name, "pt") as reference:
                raw = reference.get_slice(parameter)[index]
            assert torch.equal(files.read(parameter, index), raw), (parameter, index)
            assert files.read(parameter, index).dtype == raw.dtype


@pytest.mark.parametrize("codec", CODECS)
def test_each_rank_pays_for_its_own_shard(hub, name, base_folder, tmp_path, codec):
    """FSDP's layout: rank r of N holds part r of `torch.chunk` over the first dimension; the last can be shorter or empty."""
    folder = make_fisher(base_folder).save_pretrained(tmp_path / "fisher", codec=codec, max_shard_size="650KB")
    commit = push(folder, name)
    shards = list(folder.glob("fisher-*.safetensors"))
    headers = sum(map(header_bytes, shards))
    tensors = sum(shard.stat().st_size for shard in shards) - headers
    described = sum((folder / file).stat().st_size for file in ("fisher_config.json", "fisher.safetensors.index.json"))
    whole, costs, parts = FisherInformation.from_pretrained(folder), [], {parameter: [] for parameter in SHAPES}
    for rank in range(RANKS):
        hub.reset()
        _, read, _ = open_streamed(name, commit, cache_dir=tmp_path / f"cache-{rank}")
        assert hub.bytes_served == described + headers, "to open it costs the manifest, the index and the headers"
        for parameter, shape in SHAPES.items():
            chunks = torch.arange(shape[0]).chunk(RANKS)
            rows = slice(int(chunks[rank][0]), int(chunks[rank][-1]) + 1) if rank < len(chunks) else slice(0, 0)
            parts[parameter].append(read(parameter, (rows,)))
        costs.append(hub.bytes_served - described - headers)
    for parameter in SHAPES:
        assert torch.equal(torch.cat(parts[parameter]), whole.read(parameter))
    # a part of a vector is decoded from all of it in log8, so that the others read it once more: codes, maxima, spans
    again = (RANKS - 1) * (300 + 3 * 4 + 3 * 2) if codec == "log8" else 0
    assert sum(costs) == tensors + again, "together, the ranks fetch each byte of the tensors once"
    assert [cost / tensors for cost in costs] == pytest.approx([1 / RANKS] * RANKS, rel=0.05)
    assert not list(tmp_path.glob("cache-*/**/*.safetensors")), "nothing of the tensors is kept"


def test_one_row_costs_one_row(hub, name, folder):
    files = remote_files(name, "dataset", push(folder, name))
    shard = "fisher-00001-of-00002.safetensors"
    hub.reset()
    tensors = RemoteTensors([files[shard]])
    assert hub.bytes_served == header_bytes(folder / shard)
    row = tensors.read("embed.weight", (slice(500, 501),))
    assert row.shape == (1, 300)
    assert hub.bytes_served == header_bytes(folder / shard) + 600
    assert hub.count("HEAD .*/resolve/") == 1, "the link that the Hub gave is used again"
    assert hub.count(CONTENT) == 3, "length of the header, header, row"


def test_the_token_opens_a_private_fisher_and_stays_with_the_hub(hub, name, folder, caplog):
    """The server's storage refuses every request that carries a token."""
    commit = push(folder, name, private=True)
    with caplog.at_level(logging.DEBUG):
        _, read, _ = open_streamed(name, commit)
        hub.faults.append(Fault(CONTENT, status=403))
        read("norm.weight", None)
        assert hub.count(CONTENT) > 2
        with pytest.raises(HubError, match="no such repository") as caught:
            open_streamed(name, commit, token="hf_other")
        with pytest.raises(HubError, match="token was refused") as wrong:
            open_streamed(name, commit, token="hf_ThisTokenIsNobodys123")
    for text in (caplog.text, str(caught.value), str(wrong.value)):
        assert not {"hf_owner", "hf_other", "hf_ThisTokenIsNobodys123"} & set(text.replace("'", " ").split())


def test_what_the_hub_lists_is_held_against_the_manifest(hub, name, folder):
    shard = "fisher-00002-of-00002.safetensors"
    good = push(folder, name)
    changed = bytearray((folder / shard).read_bytes())
    changed[-1] ^= 1
    (folder / shard).write_bytes(changed)
    commit = push(folder, name)
    hub.reset()
    with pytest.raises(FisherFormatError, match=rf"{shard} has sha256 {sha256_file(folder / shard)}, recorded is"):
        open_streamed(name, commit)
    assert hub.count(CONTENT) == 0
    open_streamed(name, good)  # the pinned commit before is as good as ever

    (folder / shard).write_bytes(changed[:-1])
    with pytest.raises(FisherFormatError, match=f"{shard} has [0-9,]+ bytes, recorded are .*was an upload cut off"):
        open_streamed(name, push(folder, name))

    def remove(path: str) -> str:
        return HfApi().delete_file(path, name, repo_type="dataset").oid

    with pytest.raises(FisherFormatError, match=f"{shard} is missing"):
        open_streamed(name, remove(shard))
    with pytest.raises(FisherFormatError, match=r"index\.json is missing"):
        open_streamed(name, remove("fisher.safetensors.index.json"))
    with pytest.raises(FisherFormatError, match=r"holds no fisher_config\.json, so it is not a Fisher"):
        open_streamed(name, remove("fisher_config.json"))


def test_foreign_files_are_refused(hub, name, folder):
    (folder / "fisher-00003-of-00003.safetensors").write_bytes(b"12345678")
    with pytest.raises(FisherFormatError, match=r"00003\.safetensors is not in the manifest"):
        open_streamed(name, push(folder, name))
    (folder / "values.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(FisherFormatError, match=r"values\.pkl is a pickle"):
        open_streamed(name, push(folder, name))


def test_names_that_lead_elsewhere_are_refused(hub, name, folder):
    edit(folder, lambda data: data["storage"]["shards"].update({"../model.safetensors": {"sha256": "0" * 64, "size": 3}}))
    with pytest.raises(FisherFormatError, match=r"\.\./model\.safetensors is not a shard's name"):
        open_streamed(name, push(folder, name))


def test_headers_are_held_against_manifest_and_index(hub, name, folder):
    rewrite(folder, lambda tensors: tensors.update({"head.weight": tensors["head.weight"][:5].clone()}))
    with pytest.raises(FisherFormatError, match=r"head\.weight is BF16 \(5, 257\) in .*, recorded is BF16 \(77, 257\)"):
        open_streamed(name, push(folder, name))
    path = max(folder.glob("fisher-*.safetensors"))
    content = bytearray(path.read_bytes())
    content[9] = 0
    path.write_bytes(content)
    shard = {path.name: {"sha256": sha256_file(path), "size": len(content)}}
    edit(folder, lambda data: data["storage"]["shards"].update(shard))
    with pytest.raises(FisherFormatError, match=f"{path.name} is not a whole safetensors file"):
        open_streamed(name, push(folder, name))


def test_a_header_that_arrives_damaged_is_noticed(hub, name, folder):
    commit = push(folder, name)
    hub.faults.append(Fault(CONTENT, corrupt=True, times=2))  # the length of a header, in its highest byte
    with pytest.raises(FisherFormatError, match="its header claims"):
        open_streamed(name, commit)


BAD = {
    "nan": ("bfloat16", "norm.weight", float("nan"), "norm.weight is not finite: 1 of"),
    "infinite": ("float32", "norm.weight", float("inf"), "norm.weight is not finite: 1 of"),
    "negative": ("bfloat16", "norm.weight", -1.0, r"norm.weight has negative values \(least -1\)"),
    "scale": ("log8", "norm.weight::scale", float("nan"), "norm.weight::scale is not finite"),
    "span": ("log8", "norm.weight::span", -1.0, "norm.weight::span has 1 of . values outside 0 to 278"),
}


@pytest.mark.parametrize("kind", BAD)
def test_values_are_checked_when_they_are_read(hub, name, base_folder, tmp_path, kind):
    codec, key, value, said = BAD[kind]
    folder = make_fisher(base_folder).save_pretrained(tmp_path / "fisher", codec=codec)
    rewrite(folder, lambda tensors: tensors[key].view(-1)[:1].fill_(value))
    _, read, _ = open_streamed(name, push(folder, name))
    assert read("embed.weight", (slice(0, 3),)).shape == (3, 300), "tensors beside it, and empty parts, are as good as ever"
    assert read("embed.weight", (slice(0, 0),)).shape == (0, 300)
    with pytest.raises(FisherFormatError, match=said) as caught:
        read("norm.weight", (slice(0, 200),))
    assert "was damaged before it was pushed" in str(caught.value)


def test_the_anchor_of_a_fold_is_streamed_too(hub, name, base_folder, tokenizer, tmp_path):
    """Two tasks one after the other: the fold brings an anchor that is no model's weights, in files of its own."""
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.save_pretrained(tmp_path / "trained")
    tokenizer.save_pretrained(tmp_path / "trained")
    pair = [training.make_fisher(base_folder), training.make_fisher(tmp_path / "trained")]
    folder = FisherInformation.fold(pair).save_pretrained(tmp_path / "fold")
    commit, local = push(folder, name), FisherInformation.from_pretrained(folder)
    manifest, read, anchor = open_streamed(name, commit)
    assert manifest == local.manifest
    norm, rows = "model.norm.weight", (slice(3, 9),)
    for parameter, index in (("model.embed_tokens.weight", rows), (norm, None)):
        assert torch.equal(read(parameter, index), local.read(parameter, index))
        assert torch.equal(anchor(parameter, index), local.anchor([parameter]).read(parameter, index))

    (path,) = folder.glob("anchor-*.safetensors")
    tensors = load_file(path)
    tensors[norm][0] = float("nan")
    save_file(tensors, path)
    record = {path.name: {"sha256": sha256_file(path), "size": path.stat().st_size}}
    edit(folder, lambda data: data["fold"]["anchor"].update(record))
    _, _, anchor = open_streamed(name, push(folder, name))
    with pytest.raises(FisherFormatError, match=rf"the anchor of {norm} has 1 values that are NaN or infinite"):
        anchor(norm, None)
    tensors[norm] = tensors[norm][:3].clone()
    save_file(tensors, path)
    record = {path.name: {"sha256": sha256_file(path), "size": path.stat().st_size}}
    edit(folder, lambda data: data["fold"]["anchor"].update(record))
    with pytest.raises(FisherFormatError, match=rf"anchor: {norm} is F32 \(3,\) in {path.name}, recorded is F32 \(32,\)"):
        open_streamed(name, push(folder, name))


def test_from_pretrained_streams(hub, name, folder, tmp_path):
    commit, local = push(folder, name), FisherInformation.from_pretrained(folder)
    fisher = FisherInformation.from_pretrained(name, streaming=True, cache_dir=tmp_path / "cache")
    assert (fisher.place.repo_id, fisher.place.commit) == (name, commit)
    assert fisher.sha256 == local.sha256
    part = ("embed.weight", (slice(7, 9), slice(2, None)))
    assert torch.equal(fisher.per_token(*part), local.per_token(*part))
    cached = {path.name for path in tmp_path.glob("cache/datasets--*/snapshots/**/*.*")}
    assert cached == {"fisher_config.json", "fisher.safetensors.index.json"}


def test_an_unknown_revision(hub, name, folder):
    push(folder, name)
    with pytest.raises(HubError, match=f"no branch, tag or commit '{'ab' * 20}'"):
        open_streamed(name, "ab" * 20)
    with pytest.raises(HubError, match="no such repository"):
        open_streamed("alice/nothing-here", "ab" * 20)


def test_the_cache_needs_no_network(hub, name, folder):
    """Whole files in the cache are read by slices without a request, in a process that may not send one."""
    part = ("embed.weight", (slice(10, 20), slice(3, 5)))
    expected = FisherInformation.from_pretrained(folder).read(*part)
    commit = push(folder, name)
    assert torch.equal(FisherInformation.from_pretrained(name).read(*part), expected)
    hub.reset()
    code = (
        "import sys, torch\n"
        "from hf_ewc.artifact import FisherInformation\n"
        "fisher = FisherInformation.from_pretrained(sys.argv[1], streaming=True)\n"  # which is of no use offline
        "torch.save((fisher.place.commit, fisher.read('embed.weight', (slice(10, 20), slice(3, 5)))), sys.argv[2])\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code, name, folder.parent / "part.pt"], env=environment, check=True)
    pinned, values = torch.load(folder.parent / "part.pt", weights_only=True)
    assert pinned == commit
    assert torch.equal(values, expected)
    assert hub.log == []
