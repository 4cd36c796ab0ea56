"""The Fisher of a sharded model (FSDP2) is that of a whole one: two or three gloo processes against one, example by example."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import sharded_worker as worker
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from hf_ewc.errors import ConfigError
from hf_ewc.fisher import Example, accumulate_squares, collate, prepared
from hf_ewc.fisher.per_example import negative_log_likelihood
from hf_ewc.fisher.sharded import ShardedSquares, check_world, shard

CASES = {
    2: [
        *("tied", "untied", "checkpointed", "bfloat16", "twice", "shared_weight", "in_parts", "untied-lopsided"),
        *(
            "tied-same",
            "tied-parts",
            "tied-weighted",
            "tied-sampled",
            "tied-resumed",
            "tied-behind",
            "tied-batch",
            "tied-batchsame",
        ),
        *("poisoned-nan", "poisoned-nansame", "tied-nangrad", "bfloat16-coarse"),
    ],
    3: ["untied", "untied-lopsided"],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, Path]:
    """Folder with what the processes left, by the number of them."""
    folders = {}
    for world, cases in CASES.items():
        folders[world] = tmp_path_factory.mktemp(f"world{world}")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
        command = [sys.executable, *launcher, worker.__file__, str(folders[world]), *cases]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-5000:]
    return folders


def seen(folder: Path, case: str) -> list[dict]:
    """What each rank saw."""
    return [json.loads(path.read_text())[case] for path in sorted(folder.glob("*.json"))]


def one_process(name: str, examples: list[Example], row=lambda example: collate([example])) -> dict[str, torch.Tensor]:
    """The reference path on the whole model."""
    model = worker.MODELS[name]()
    with worker.ready(model) as sums:
        for example in examples:
            assert all(accumulate_squares(model, row(example), sums))
    return sums


def squares_of_batches(name: str, batches: list[list[Example]]) -> dict[str, torch.Tensor]:
    """Σ over batches of the square of the batch's summed gradient, on the whole model, one example's backward at a time."""
    model = worker.MODELS[name]()
    sums = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for batch in batches:
        for example in batch:
            negative_log_likelihood(model, torch.tensor(example.input_ids), torch.tensor(example.labels)).backward()
        for name, parameter in model.named_parameters():
            sums[name] += parameter.grad**2
            parameter.grad = None
    return sums


def apart(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """‖found − expected‖ / ‖expected‖ of the parameter where it is largest."""
    assert found.keys() == expected.keys()
    assert all(found[name].shape == expected[name].shape for name in expected)
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


@pytest.mark.parametrize(
    ("world", "case"),
    [
        *((2, case) for case in ("tied", "untied", "checkpointed", "bfloat16", "twice", "shared_weight", "tied-resumed")),
        *((2, "untied-lopsided"), (3, "untied"), (3, "untied-lopsided")),
    ],
)
def test_sharded_processes_with_uneven_shares_give_the_fisher_of_one_process(results, world, case):
    found = load_file(results[world] / f"{case}.safetensors")
    assert apart(found, one_process(case.partition("-")[0], worker.examples())) < 1e-6
    for rank in seen(results[world], case):
        assert rank["mode"] == "unsharded_gradient"
        assert rank["self_check"] < 1e-6
        assert all(all(step) for step in rank["counted"])


def test_the_models_of_these_tests_are_what_their_names_say(results):
    tied, untied = worker.MODELS["tied"](), worker.MODELS["untied"]()
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    plain, checkpointed = (seen(results[2], case)[0]["forwards"] for case in ("tied", "checkpointed"))
    assert checkpointed == 2 * plain, "the forward pass was not repeated, so nothing was checkpointed"


def test_squaring_behind_the_reduce_scatter_would_be_another_thing(results):
    # The same examples on the same processes, but `.grad` is squared, as an optimizer sees it. What comes out is the square
    # of the sum over ranks; this also shows that `ShardedSquares` leaves a model whose gradients FSDP2 averages as ever.
    found = load_file(results[2] / "tied-behind.safetensors")
    examples = worker.examples()
    assert apart(found, one_process("tied", examples)) > 0.3
    assert apart(found, squares_of_batches("tied", [examples[n : n + 2] for n in range(0, len(examples), 2)])) < 1e-6


@pytest.mark.parametrize("case", ["tied-same", "tied-parts"])
def test_the_same_example_on_all_ranks_gives_the_same_fisher(results, case):
    found = load_file(results[2] / f"{case}.safetensors")
    assert apart(found, one_process("tied", worker.examples())) < 1e-6
    for rank in seen(results[2], case):
        assert rank["mode"] == "same_example"


def test_the_self_test_finds_gradients_that_come_in_parts(results):
    for rank in seen(results[2], "tied-parts"):  # and the test above shows that the result is right all the same
        assert rank["self_check"] > 0.3


def test_each_process_holds_its_shard_of_the_sums_only(results):
    for world, case in ((2, "tied"), (2, "untied"), (3, "untied")):
        ranks = seen(results[world], case)
        for name, whole in ranks[0]["whole"].items():
            own = [rank["numbers"][name] for rank in ranks]
            assert sum(own) == whole, name
        sizes = {name: parameter.shape for name, parameter in worker.MODELS[case]().named_parameters()}
        most = sum(-(-shape[0] // world) * shape[1:].numel() for shape in sizes.values())
        assert max(sum(rank["numbers"].values()) for rank in ranks) == most
        assert all(rank["dtypes"] == ["torch.float32"] for rank in ranks)


def test_sums_of_a_bfloat16_model_are_not_rounded_to_bfloat16(results):
    found = load_file(results[2] / "bfloat16.safetensors")
    rounded = {name: total.to(torch.bfloat16).float() for name, total in found.items()}
    assert apart(rounded, found) > 1e-3  # so the agreement to 1e-6 above says something


def test_gradients_reduced_in_bfloat16_are_refused(results):
    for rank in seen(results[2], "bfloat16-coarse"):
        assert "torch.bfloat16" in rank["error"]
        assert "reduce_dtype=torch.float32" in rank["error"]


def test_a_model_that_fsdp2_gets_wrong_is_refused(results):
    # a layer that runs twice, each time in a reentrant checkpoint: FSDP2 leaves gradients lying about, with or without us
    for rank in seen(results[2], "in_parts"):
        assert "layers.0" in rank["error"]
        assert "use_reentrant=False" in rank["error"]


@pytest.mark.parametrize("case", ["poisoned-nan", "poisoned-nansame"])
def test_an_example_that_is_nan_is_left_out_and_spoils_no_other_rank(results, case):
    good = [example for number, example in enumerate(worker.with_bad(0, 4, 5)) if number not in (0, 4, 5)]
    found = load_file(results[2] / f"{case}.safetensors")
    assert apart(found, one_process("untied", good)) < 1e-6
    for rank in seen(results[2], case):  # examples 0 and 1, 2 and 3, 4 and 5, 6 and none; every rank knows of all
        assert rank["counted"] == [[False, True], [True, True], [False, False], [True, True]]


def test_an_example_whose_gradient_alone_is_nan_is_left_out_too(results):
    good = [example for number, example in enumerate(worker.with_bad(0, 4, 5)) if number not in (0, 4, 5)]
    assert apart(load_file(results[2] / "tied-nangrad.safetensors"), one_process("tied", good)) < 1e-6


@pytest.mark.parametrize("how", ["weighted", "sampled"])
def test_weights_and_drawn_labels_are_those_of_one_process(results, how):
    found = load_file(results[2] / f"tied-{how}.safetensors")
    assert apart(found, one_process("tied", worker.examples(), getattr(worker, how))) < 1e-6
    assert apart(found, one_process("tied", worker.examples())) > 0.1


@pytest.mark.parametrize(("case", "mode"), [("tied-batch", "unsharded_gradient"), ("tied-batchsame", "same_example")])
def test_granularity_batch_squares_the_gradient_of_the_global_batch(results, case, mode):
    examples = worker.examples()
    batches = [examples[0:4], examples[4:6]]  # two processes had 3 + 1 rows, then 2 + none
    assert apart(load_file(results[2] / f"{case}.safetensors"), squares_of_batches("tied", batches)) < 1e-6
    assert {rank["mode"] for rank in seen(results[2], case)} == {mode}


def test_a_run_with_another_number_of_processes_is_refused(monkeypatch):
    assert check_world(None) == check_world(1) == 1
    with pytest.raises(ConfigError) as error:  # this test is one process, as a script under a careless launcher
        check_world(2)
    assert "`num_processes: 2`" in str(error.value)
    assert "started 1" in str(error.value)
    assert "torchrun --nproc_per_node 2" in str(error.value)
    assert "--multi_gpu --num_processes 2" in str(error.value)
    monkeypatch.setenv("WORLD_SIZE", "4")  # what torchrun sets
    assert check_world(4) == 4
    with pytest.raises(ConfigError, match="started 4"):
        check_world(2)


def test_a_model_that_is_not_sharded_is_refused():
    with pytest.raises(ConfigError, match="not sharded"):
        ShardedSquares(worker.MODELS["tied"]())


def test_one_process_alone_is_a_shard_of_one():
    model = worker.MODELS["tied"]()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        shard(model)
        with prepared(model):
            squares = ShardedSquares(model)
            for example in worker.examples():
                assert squares.accumulate(collate([example])) == [True]
            with pytest.raises(ValueError, match="one example per process"):
                squares.accumulate(collate(worker.examples()))
            found = {name: squares.full(name) for name in squares.sums}
    finally:
        dist.destroy_process_group()
    assert apart(found, one_process("tied", worker.examples())) < 1e-6
    assert squares.self_check is None
