"""`hf-ewc fisher · train · evaluate · sweep · demo · env`: one small file each, with `run(argv) -> int`.

Nothing in here imports torch before a command really starts, so that every `--help` answers at once.
"""
