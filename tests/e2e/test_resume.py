"""`kill -9` in the middle of training, then resume: bitwise the run that was never interrupted (on a CPU)."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import training
from safetensors.torch import load_file

from hf_ewc.trainer import last_complete_checkpoint

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import training
from hf_ewc.trainer import last_complete_checkpoint
from transformers import TrainerCallback

class Slow(TrainerCallback):  # leaves time to be killed between two checkpoints
    def on_step_end(self, args, state, control, **kwargs):
        import time
        print("step", state.global_step, flush=True)
        time.sleep({pause})

trainer = training.ewc_trainer({base!r}, {out!r}, fisher={fisher!r}, ewc_lambda=0.05, ewc_mode={mode!r}, optim={optim!r},
                               max_steps=10, save_strategy="steps", save_steps=2)
trainer.add_callback(Slow())
checkpoint = last_complete_checkpoint({out!r}) if {resume} else None
trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
trainer.save_model()
"""


def _run(base: Path, fisher: str, out: Path, mode: str, optim: str, *, resume=False, pause=0.0, kill_after=None) -> None:
    code = SCRIPT.format(
        tests=str(Path(training.__file__).parent),
        base=str(base),
        out=str(out),
        fisher=fisher,
        mode=mode,
        optim=optim,
        resume=resume,
        pause=pause,
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if kill_after is not None:
        for line in process.stdout:
            if line.strip() == f"step {kill_after}":
                time.sleep(0.05)
                os.kill(process.pid, signal.SIGKILL)
                break
    _, errors = process.communicate(timeout=300)
    if kill_after is None:
        assert process.returncode == 0, errors[-3000:]
    else:
        assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("mode", "optim"), [("proximal", "paged_adamw_8bit"), ("loss", "adamw_torch"), ("decoupled", "paged_adamw_8bit")]
)
def test_a_killed_run_resumes_bitwise(base_folder, tmp_path, mode, optim):
    fisher = str(training.make_fisher(base_folder).save_pretrained(tmp_path / "f"))
    _run(base_folder, fisher, tmp_path / "whole", mode, optim)
    _run(base_folder, fisher, tmp_path / "killed", mode, optim, pause=0.3, kill_after=5)
    assert last_complete_checkpoint(tmp_path / "killed").name == "checkpoint-4"
    _run(base_folder, fisher, tmp_path / "killed", mode, optim, resume=True)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    states = [(tmp_path / name / "ewc_state.json").read_text() for name in ("whole", "killed")]
    assert states[0] == states[1]  # the same anchor: that of the base, not of the checkpoint


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    for step, state in ((2, "{}"), (10, "{}"), (12, None), (14, '{"epoch": 0.5, "log_hi')):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").touch()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_complete_checkpoint(tmp_path).name == "checkpoint-10"
    assert last_complete_checkpoint(tmp_path / "nothing") is None
