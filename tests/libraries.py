"""What the workers import, imported once by the fork server of `tests/warm.py`."""

import os

_before = dict(os.environ)
# Before the imports: DeepSpeed looks for a GPU then, huggingface_hub for its mode, and no test needs the hub.
os.environ.update({"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"})

import deepspeed.launcher.runner  # noqa: E402, F401

import sampler.replica  # noqa: E402, F401
import tests.policy_run  # noqa: E402, F401
import trainer.rank  # noqa: E402, F401

SET_BY_IMPORTS = {name: value for name, value in os.environ.items() if _before.get(name) != value}
"""vLLM sets some when it is imported; a forked process has them, too."""
