"""`hf-ewc env`: what a bug report needs, and never a token."""

from __future__ import annotations

from ..errors import ConfigError

HELP = """\
Usage: hf-ewc env

Print the versions of the packages, the devices, the Hugging Face cache and offline settings, for a bug report.
Says whether a Hub token is present, never the token.
"""

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "datasets",
    "evaluate",
    "lm_eval",
    "bitsandbytes",
    "safetensors",
    "huggingface_hub",
    "tokenizers",
    "numpy",
    "pyarrow",
)
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")


def run(argv: list[str]) -> int:
    if argv:
        raise ConfigError(f"`hf-ewc env` takes no settings, got `{' '.join(argv)}`.")
    for name, value in facts().items():
        print(f"{name:<18} {value}")
    return 0


def facts() -> dict[str, str]:
    """Name → value of everything that is printed."""
    import os
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch
    from huggingface_hub import constants, get_token

    from .. import __version__

    found = {"hf_ewc": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    found["cpu"] = f"{cores} cores usable, {torch.get_num_threads()} torch threads, {memory / 2**30:.1f} GiB memory"
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            found[f"cuda:{i}"] = (
                f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, bf16 {torch.cuda.is_bf16_supported()}"
            )
    else:
        found["accelerator"] = "none (CPU only)"
    found["8-bit optimizer"] = _bitsandbytes()
    found["hf cache"] = constants.HF_HUB_CACHE
    found["offline"] = ", ".join(f"{name}={os.environ[name]}" for name in OFFLINE if name in os.environ) or "no"
    found["hub token"] = "present" if get_token() else "none"
    return found


def _bitsandbytes() -> str:
    try:
        from bitsandbytes.cextension import lib

        return type(lib).__name__
    except Exception as error:  # a broken native library is exactly what the report is for
        return f"broken: {type(error).__name__}: {error}"
