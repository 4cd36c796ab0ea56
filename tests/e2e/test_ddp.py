"""Two gloo processes under DDP follow the trajectory of one process with the same global batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import training
from safetensors.torch import load_file

SCRIPT = """
import os, sys
sys.path.insert(0, {tests!r})
import training
from hf_ewc.cli.main import end_process
world = int(os.environ.get("WORLD_SIZE", "1"))
trainer = training.ewc_trainer({base!r}, {out!r}, fisher={fisher!r}, ewc_lambda=3e-3, ewc_mode={mode!r}, learning_rate={lr},
                               max_steps=4, per_device_train_batch_size=4 // world, optim={optim!r},
                               ddp_backend="gloo" if world > 1 else None)
assert trainer.accelerator.num_processes == world, trainer.accelerator.num_processes
trainer.train()
trainer.save_model()
end_process(0)
"""


def _run(launcher: list[str], base: Path, fisher: str, out: Path, mode: str, optim: str, lr: float) -> dict:
    script = out.with_suffix(".py")
    tests = str(Path(training.__file__).parent)
    values = dict(tests=tests, base=str(base), out=str(out), fisher=fisher, mode=mode, optim=optim, lr=lr)
    script.write_text(SCRIPT.format(**values))
    done = subprocess.run([sys.executable, *launcher, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize(("mode", "optim", "lr"), [("loss", "sgd", 3e-2), ("proximal", "adamw_torch", 1e-3)])
def test_two_processes_follow_one(base_folder, fisher_folder, tmp_path, mode, optim, lr):
    one = _run([], base_folder, fisher_folder, tmp_path / "one", mode, optim, lr)
    # `--standalone` takes a free port on this machine; `accelerate launch` with `use_cpu` would silently start one process
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = _run(launcher, base_folder, fisher_folder, tmp_path / "two", mode, optim, lr)
    assert training.largest_difference(one, two) < 1e-6
