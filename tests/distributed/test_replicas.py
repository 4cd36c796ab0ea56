"""`torchrun hf-ewc fisher`: two processes with a share of the examples each give the Fisher of one, also after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch

from hf_ewc import FisherConfig, FisherInformation, estimate_fisher

TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def command(processes: int, arguments: list[str]) -> list[str]:
    return [sys.executable, *(TWO if processes == 2 else []), "-m", "hf_ewc.cli.main", "fisher", *map(str, arguments)]


def run(processes: int, *arguments: object, fails: bool = False) -> str:
    done = subprocess.run(
        command(processes, list(arguments)),
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done.stdout + done.stderr


def apart(left: Path, right: Path) -> float:
    """Largest difference of two stored Fishers, relative to each tensor's largest value."""
    one, two = FisherInformation.from_pretrained(left), FisherInformation.from_pretrained(right)
    assert one.names == two.names
    assert one.normalizer == two.normalizer
    return max(float((one.read(n) - two.read(n)).abs().max() / one.read(n).max()) for n in one.names)


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """17 of them: they cannot be shared out evenly."""
    return tiny.write_jsonl(tmp_path_factory.mktemp("data") / "questions.jsonl", (tiny.QUESTIONS * 3)[:17])


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["--labels", "sampled", "--draws", "2"],
        ["--granularity", "token"],
        ["--granularity", "batch"],
        ["--sharding", "fsdp2"],
        ["--sharding", "fsdp2", "--labels", "options"],
        ["--sharding", "fsdp2", "--granularity", "batch", "--labels", "sampled", "--draws", "2"],
    ],
    ids=" ".join,
)
def test_two_processes_give_the_fisher_of_one(base_folder, questions, tmp_path, settings):
    common = ["--model", base_folder, "--dataset", questions, "--codec", "float32", "--batch_size", 3, *settings]
    run(1, *common, "--sharding", "replicate", "--output_dir", tmp_path / "one")
    said = run(2, *common, "--output_dir", tmp_path / "two", "--num_processes", 2)
    assert apart(tmp_path / "one", tmp_path / "two") < 1e-6
    assert said.count("17 examples") == 1, "one process speaks for both"
    one, two = (FisherInformation.from_pretrained(tmp_path / name).manifest.estimator for name in ("one", "two"))
    for left, right in zip(one.stability, two.stability, strict=True):
        assert left.examples == right.examples
        # (shards draw another sample of the weights)
        assert abs(left.correlation - right.correlation) < (0.05 if "fsdp2" in settings else 1e-4)
    if "fsdp2" not in settings:  # the scatter of the batches, where there is one, is that of all of them
        assert (two.trace_stderr is None) == ("batch" not in settings)
        assert one.trace_stderr == (two.trace_stderr and pytest.approx(two.trace_stderr, rel=1e-4))
    assert not list(tmp_path.glob("*.partial")), "the running sums of both are cleared away"


def test_a_launcher_that_starts_one_process_is_noticed(base_folder, questions, tmp_path):
    said = run(
        1, "--model", base_folder, "--dataset", questions, "--output_dir", tmp_path / "o", "--num_processes", 2, fails=True
    )
    assert "num_processes: 2" in said
    assert "torchrun" in said
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("sharding", ["replicate", "fsdp2"])
def test_two_killed_processes_resume_to_the_fisher_of_an_uninterrupted_run(base_folder, tmp_path, sharding):
    data = tiny.write_jsonl(tmp_path / "questions.jsonl", tiny.QUESTIONS * 50)
    common = ["--model", base_folder, "--dataset", data, "--codec", "float32", "--batch_size", 2, "--save_every", 4]
    common += ["--sharding", sharding]
    run(2, *common, "--output_dir", tmp_path / "straight")
    out, work = tmp_path / "out", tmp_path / "out.partial"
    process = subprocess.Popen(
        command(2, [*common, "--output_dir", str(out)]),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    limit = time.monotonic() + 120
    try:
        while len(list(work.glob("process-*/estimate.json"))) < 2 and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.01)
    finally:
        # the launcher starts each worker in a session of its own, so they are not killed with it
        workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
    process.wait()
    assert len(workers) == 2
    assert not out.exists(), "it should have been killed in the middle"
    positions = [json.loads(path.read_text())["position"] for path in work.glob("process-*/estimate.json")]
    assert len(positions) == 2
    assert all(0 < position < 300 for position in positions)
    said = run(2, *common, "--output_dir", out, "--resume")
    assert "Nothing to resume" not in said
    assert "300 examples" in said
    one, two = FisherInformation.from_pretrained(out), FisherInformation.from_pretrained(tmp_path / "straight")
    for name in one.names:
        assert torch.equal(one.read(name), two.read(name))


def test_a_resumed_run_with_another_number_of_processes_or_batch_size_is_refused(base_folder, questions, tmp_path):
    work = ["--work_dir", tmp_path / "work"]
    common = ["--model", base_folder, "--dataset", questions, "--batch_size", 3, *work]
    run(2, *common, "--output_dir", tmp_path / "one")
    said = run(2, *common[:-4], "--batch_size", 2, *work, "--output_dir", tmp_path / "two", "--resume", fails=True)
    assert "cannot be continued with other settings" in said


SEVERAL = """
import json, sys
from hf_ewc import ConfigError, DataError, FisherConfig, estimate_fisher
from hf_ewc.cli.main import end_process
base, poisoned, out = sys.argv[1:]
row = lambda first, n: {"input_ids": [2, first, 50, 51, 52 + n], "labels": [-100, -100, 50, 51, 52 + n]}
one = estimate_fisher(base, FisherConfig(num_processes=2), dataset=[row(60, 0)], progress=False)
few = estimate_fisher(base, FisherConfig(batch_size=2), dataset=[row(60 + n, n) for n in range(5)], progress=False)
from hf_ewc.fisher import Replicas
rank = Replicas.joined().rank
for name, fisher in (("one", one), ("few", few)):
    fisher.save_pretrained(f"{out}/{name}-{rank}", codec="float32")
# with batches of two, example 1 falls to the first process and example 5 to the second: one each is few enough, both are not
rows = [row(90 if n in (0, 4) else 60 + n, n) for n in range(20)]
config = FisherConfig(batch_size=2, max_dropped=0.05)
try:
    estimate_fisher(poisoned, config, dataset=rows, progress=False)
except DataError as error:
    open(f"{out}/said-{rank}", "w").write(str(error))
try:
    estimate_fisher(base, FisherConfig(), dataset=[row(60 + rank, 0)], progress=False)
except ConfigError as error:
    open(f"{out}/differ-{rank}", "w").write(str(error))
end_process(0)
"""


def test_two_processes_estimate_several_times_also_where_one_has_nothing_to_do_and_count_what_both_dropped(
    base_folder, tokenizer, tmp_path
):
    model = tiny.make_model(len(tokenizer), tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[90] = torch.nan
    model.save_pretrained(tmp_path / "poisoned")
    tokenizer.save_pretrained(tmp_path / "poisoned")
    script = tmp_path / "several.py"
    script.write_text(SEVERAL)
    done = subprocess.run(
        [sys.executable, *TWO, str(script), str(base_folder), str(tmp_path / "poisoned"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [{"input_ids": [2, 60 + n, 50, 51, 52 + n], "labels": [-100, -100, 50, 51, 52 + n]} for n in range(5)]
    for name, data in (("one", rows[:1]), ("few", rows)):
        expected = estimate_fisher(base_folder, FisherConfig(), dataset=data, progress=False)
        expected.save_pretrained(tmp_path / name, codec="float32")
        for rank in (0, 1):
            assert apart(tmp_path / f"{name}-{rank}", tmp_path / name) < 1e-6
    for rank in (0, 1):
        assert "2 of 20 examples so far (number 1, 5)" in (tmp_path / f"said-{rank}").read_text()
        assert "do not estimate the same Fisher: `probe` is" in (tmp_path / f"differ-{rank}").read_text()


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    """A configuration with a task of lm-evaluation-harness over local files, questions and running text."""
    folder = tmp_path_factory.mktemp("mixture")
    train = tiny.write_jsonl(folder / "animals.jsonl", tiny.QUESTIONS)
    texts = tiny.write_jsonl(folder / "texts.jsonl", [{"text": text} for text in tiny.TEXTS])
    tasks = folder / "tasks"
    tasks.mkdir()
    task = {
        "task": "animals",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"train": str(train)}},
        "training_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "num_fewshot": 1,
    }
    (tasks / "animals.yaml").write_text(json.dumps(task))  # JSON is YAML
    probes = {
        "animals": {"probe": "lm_eval:animals", "task_folder": str(tasks), "max_length": 128, "weight": 2},
        "letters": {"probe": "mmlu", "dataset": str(train)},
        "text": {"probe": "text", "dataset": str(texts), "max_length": 24},
    }
    config = folder / "fisher.yaml"
    config.write_text(json.dumps({"probes": probes, "codec": "float32", "batch_size": 3}))
    return config


def test_a_mixture_with_a_task_of_the_harness_is_the_same_fisher_by_every_path(base_folder, mixture, tmp_path):
    common = ["--config", mixture, "--model", base_folder]
    run(1, *common, "--path", "one_by_one", "--output_dir", tmp_path / "reference")
    run(1, *common, "--output_dir", tmp_path / "batched")
    run(2, *common, "--output_dir", tmp_path / "replicas")
    run(2, *common, "--sharding", "fsdp2", "--output_dir", tmp_path / "sharded")
    paths = {}
    for name in ("batched", "replicas", "sharded"):
        assert apart(tmp_path / "reference", tmp_path / name) < 1e-6
        manifest = FisherInformation.from_pretrained(tmp_path / name).manifest
        paths[name] = manifest.estimator.path
        assert [(probe.name, probe.kind, probe.task, probe.weight) for probe in manifest.probes] == [
            ("animals", "lm_eval", "animals", 0.5),
            ("letters", "mmlu", None, 0.25),
            ("text", "text", None, 0.25),
        ]
    assert paths == {"batched": "batched", "replicas": "batched", "sharded": "fsdp2_unsharded_gradient"}
