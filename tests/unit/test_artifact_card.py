"""What people see of a Fisher: the card, and the table that the viewer and `load_dataset` show."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from huggingface_hub import DatasetCard
from test_artifact_store import T, make_fisher

from hf_ewc.artifact import ADAM_PATH, BaseModel, FisherInformation, StabilityRecord
from hf_ewc.artifact import summary as summary_module
from hf_ewc.artifact.card import render_card
from hf_ewc.artifact.picture import trace_bars, trace_picture
from hf_ewc.artifact.summary import describe
from hf_ewc.hub import Licence

THIRDS, GROUPS = ("layer 0", "layer 1", "outside the layers"), ("attention", "embedding", "mlp", "norm")


@pytest.fixture(scope="module")
def folder(base_folder, tmp_path_factory) -> Path:
    return make_fisher(BaseModel.resolve(base_folder)).save_pretrained(tmp_path_factory.mktemp("card") / "fisher")


@pytest.fixture(scope="module")
def manifest(folder):
    return FisherInformation.from_pretrained(folder).manifest


def test_load_dataset_shows_one_row_per_tensor_offline(folder, tmp_path):
    rows = load_dataset(str(folder), cache_dir=str(tmp_path))["params"]
    fisher = FisherInformation.from_pretrained(folder)
    assert rows["name"] == fisher.names
    for row in rows:
        values = fisher.per_token(row["name"])
        assert tuple(row["shape"]) == values.shape
        assert row["trace"] == pytest.approx(values.sum(dtype=torch.float64).item(), rel=1e-6)
        assert row["mean"] == pytest.approx(row["trace"] / values.numel())
        assert row["max"] == pytest.approx(values.max().item())
        assert row["zeros"] == (values == 0).sum()
        for q in (50, 90, 99):
            expected = values.flatten().quantile(q / 100, interpolation="nearest").item()
            assert row[f"q{q}"] == pytest.approx(expected, rel=1e-5)
        assert (folder / row["shard"]).is_file()
    assert sum(rows["trace"]) == pytest.approx(fisher.trace, rel=1e-9)


def test_rows_say_where_a_parameter_stands_in_the_model(folder, tmp_path):
    rows = {row["name"]: row for row in load_dataset(str(folder), cache_dir=str(tmp_path))["params"]}
    place = {name: (row["module"], row["layer"], row["group"]) for name, row in rows.items()}
    assert place["model.embed_tokens.weight"] == ("model.embed_tokens", None, "embedding")
    assert place["model.layers.1.self_attn.q_proj.weight"] == ("model.layers.1.self_attn.q_proj", 1, "attention")
    assert place["model.layers.0.mlp.up_proj.weight"] == ("model.layers.0.mlp.up_proj", 0, "mlp")
    assert place["model.layers.0.input_layernorm.weight"] == ("model.layers.0.input_layernorm", 0, "norm")
    assert place["model.norm.weight"] == ("model.norm", None, "norm")


def test_quantiles_of_large_tensors_come_from_a_sample(monkeypatch):
    monkeypatch.setattr(summary_module, "SAMPLE", 10_000)
    values = torch.arange(200_000.0)
    row = describe("w", values, 1.0, "file")
    assert row["max"] == 199_999
    assert row["q50"] == pytest.approx(100_000, rel=0.05)
    assert row == describe("w", values, 1.0, "file")


def test_the_card_says_what_was_measured_of_which_model_and_how_to_use_it(folder):
    card = DatasetCard.load(folder / "README.md")
    manifest = FisherInformation.from_pretrained(folder).manifest
    data = card.data.to_dict()
    assert data["configs"] == [
        {"config_name": "summary", "default": True, "data_files": [{"split": "params", "path": "summary/params.parquet"}]}
    ]
    assert "license" not in data, "the licence is the base model's"
    for part in (
        manifest.base_model.fingerprint,
        "Gemma2ForCausalLM",
        "| text | every token",
        "en.jsonl",
        f"T = {T:g}",
        "EWCTrainer(",
    ):
        assert part in card.text
    assert "## Limits" in card.text
    rows = pq.read_table(folder / "summary" / "params.parquet").to_pylist()
    assert (folder / "README.md").read_text(encoding="utf-8") == render_card(manifest, rows=rows)


def test_the_card_of_a_hub_model_names_its_commit_and_that_of_a_local_one_no_path(folder):
    manifest = FisherInformation.from_pretrained(folder).manifest
    assert str(folder.parent) not in render_card(manifest)
    assert str(Path(manifest.base_model.id).parent) not in render_card(manifest)
    at_hub = BaseModel.from_dict({**manifest.base_model.to_dict(), "id": "me/tiny", "revision": "4f" * 20})
    manifest.base_model = at_hub
    card = render_card(manifest)
    commit = "4f" * 20
    assert f"`me/tiny` (Gemma2ForCausalLM), revision [`{commit}`](https://huggingface.co/me/tiny/tree/{commit})" in card
    assert "base_model: me/tiny" in card


@pytest.mark.parametrize(
    ("dataset", "shown"),
    [
        ("cais/mmlu", "cais/mmlu"),
        ("/home/someone/en.jsonl", "en.jsonl"),
        ("../private/en.jsonl", "en.jsonl"),
        (None, "in memory"),
    ],
)
def test_the_card_shows_hub_ids_whole_and_of_local_files_the_name(folder, dataset, shown):
    manifest = FisherInformation.from_pretrained(folder).manifest
    manifest.probes[0].dataset = dataset
    row = next(line for line in render_card(manifest).splitlines() if line.startswith("| text |"))
    assert f"| {shown} · train |" in row


def test_the_card_of_a_mixture_shows_both_weights(base_folder):
    fisher = make_fisher(BaseModel.resolve(base_folder))
    card = render_card(FisherInformation.mix([fisher, fisher], [1, 3]).manifest)
    assert "a weighted mixture" in card
    assert "| 0.25 |" in card
    assert "| 0.75 |" in card


def test_the_manifest_on_disk_is_readable_and_ordered_like_the_model(folder):
    data = json.loads((folder / "fisher_config.json").read_text(encoding="utf-8"))
    assert next(iter(data["parameters"])) == "model.embed_tokens.weight"
    assert data["parameters"]["model.norm.weight"] == {"shape": [32]}
    assert set(data["versions"]) >= {"hf_ewc", "torch", "transformers"}
    assert "folder" not in data["base_model"]


def test_the_card_says_which_version_made_it(manifest):
    assert f"\nMade with hf_ewc {manifest.versions['hf_ewc']}.\n" in render_card(manifest)
    assert "Made with" not in render_card(replace(manifest, versions={}))


def test_the_licence_of_a_local_base_points_to_no_page(manifest):
    text = render_card(manifest).split("## Licence\n\n")[1]
    assert text == "Derived from the base model, whose terms apply here, too.\n"


def test_the_card_says_what_was_squared_and_how_well_the_halves_agree(manifest):
    estimator = replace(
        manifest.estimator,
        granularity="batch",
        batch_size=16,
        labels="sampled",
        path="summed_gradient",
        stability=[
            StabilityRecord(examples=n, correlation=r, overlap=0.5, groups={}, probe=probe)
            for n, r, probe in ((32, 0.8, "facts"), (64, 0.91, "facts"), (32, 0.7, "text"))
        ],
    )
    card = render_card(replace(manifest, estimator=estimator))
    assert "one square per batch of 16, unbiased as the labels were drawn from the model" in card
    assert "64 examples of facts have log F correlated by 0.910" in card
    assert "32 examples of text have log F correlated by 0.700" in card
    assert "0.800" not in card
    assert "which is biased" in render_card(replace(manifest, estimator=replace(estimator, labels="empirical")))


def test_the_card_of_an_adam_state_calls_itself_an_approximation(manifest):
    card = render_card(replace(manifest, estimator=replace(manifest.estimator, path=ADAM_PATH)))
    assert "This is an APPROXIMATION, not a measurement" in card
    assert "F_i = 1/T" not in card


def test_the_card_of_a_repository_names_it_with_its_licence_probe_and_base_commit(manifest):
    base = BaseModel.from_dict({**manifest.base_model.to_dict(), "id": "me/tiny", "revision": "4f" * 20})
    probe = replace(manifest.probes[0], dataset="me/probe.v2", revision="77" * 20)
    at_hub = replace(manifest, base_model=base, probes=[probe])
    text = render_card(at_hub, repo_id="me/fisher", licence=Licence("gemma", gated="manual"))
    data = DatasetCard(text).data.to_dict()
    assert (data["license"], data["base_model"], data["source_datasets"]) == ("gemma", "me/tiny", ["me/probe.v2"])
    assert data["lineage"] == [
        {"what": "base model", "id": "me/tiny", "revision": "4f" * 20, "sha256": base.fingerprint},
        {"what": "probe", "id": "me/probe.v2", "split": "train", "revision": "77" * 20, "ids_sha256": probe.ids_sha256},
    ]
    for part in (
        f"https://huggingface.co/me/tiny/tree/{'4f' * 20}",
        'fisher="me/fisher"',
        'load_dataset("me/fisher")',
        at_hub.digest,
        "`gemma`, inherited from the base model",
        "is gated",
        "| me/probe.v2 · train · 7777777 |",
    ):
        assert part in text
    assert "path/to/this/folder" not in text
    assert "trace.png" not in text
    assert 'Pin it with `fisher_revision="…"` in `EWCConfig`: the commit of this page, or a tag.' in text
    assert "fisher_revision" not in render_card(at_hub), "a folder has no commits"
    assert "page states no licence; its terms apply here, too." in render_card(at_hub, licence=Licence())
    example = text.split("```python\n")[1].split("```")[0]
    compile(example, "card", "exec")
    assert len([line for line in example.splitlines() if line]) == 4


def test_the_card_shows_where_the_trace_lies(folder, manifest):
    rows = pq.read_table(folder / "summary/params.parquet").to_pylist()
    text = render_card(manifest, picture=True, rows=rows)
    assert "(trace.png)" in text
    lines = text.split("|:--|--:|--:|--:|\n")[1].split("\n\n")[0].splitlines()
    share = {line.split(" | ")[0].strip("| "): line.split(" | ")[2] for line in lines}
    total = sum(row["trace"] for row in rows)
    mlp = sum(row["trace"] for row in rows if row["group"] == "mlp")
    assert share["mlp"] == f"{mlp / total:.1%}"
    assert set(share) == {*THIRDS, *GROUPS}
    parts = [sum(float(share[name].rstrip("%")) for name in names) for names in (THIRDS, GROUPS)]
    assert parts == pytest.approx([100, 100], abs=0.3)


def test_the_bar_of_the_final_norm_is_not_called_as_all_norms_are(folder):
    rows = pq.read_table(folder / "summary/params.parquet").to_pylist()
    assert list(trace_bars(rows)) == ["embedding", "0", "1", "final norm"]
    other = {**rows[-1], "layer": None, "group": "norm", "module": "word_embeddings_layernorm"}
    assert list(trace_bars([*rows, other]))[-1] == "other norms"


def test_the_picture_of_the_trace_is_the_same_for_the_same_rows(folder):
    rows = pq.read_table(folder / "summary/params.parquet").to_pylist()
    png = trace_picture(rows)
    assert png[:4] == b"\x89PNG"
    assert png == trace_picture(rows), "a second push has nothing to send"
    assert png != trace_picture([{**row, "trace": row["trace"] * (1 + (row["layer"] or 0))} for row in rows])
    assert trace_picture([{"layer": 0, "group": "mlp", "trace": 0.0, "numel": 4}])[:4] == b"\x89PNG", "a trace of 0"
