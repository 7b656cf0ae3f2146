"""A lack of memory while vLLM starts, in one line with the settings to change.

vLLM's processes write the reason into their log, and the error of the one that started them says no more than that
there is one. So what they log as an error also goes into a file here.
"""

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from protocol.errors import OutOfMemory
from protocol.recipe import Recipe

NO_ROOM = re.compile(
    r"No available memory for the cache blocks|To serve at least one request .*?available KV cache memory \(.*?\)"
    r"(?:\. Based on .*? model length is \d+)?"
)
"""vLLM's words where the weights have a place and the KV cache has too little."""
TAKEN = re.compile(
    r"(?:Free|Available) memory on .*? is less than .*? GiB\)"
    r"|CUDA out of memory\.? .*?(?: is free|(?=\n|$))|can't allocate memory: you tried to allocate \d+ bytes"
)
"""vLLM's and torch's words where the machine has less than it is to take."""


@contextlib.contextmanager
def shortage_explained(recipe: Recipe, gpu: bool, logging: Mapping) -> Iterator[Path]:
    """-> a file for `logging.config.dictConfig`, in JSON, for vLLM's processes to read while they start.

    logging: how vLLM logs by itself. Raises OutOfMemory in place of vLLM's error where a process ran out of memory;
    other errors pass.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-start-") as place:  # open files outlive it
        errors, settings = Path(place) / "errors.log", Path(place) / "logging.json"
        errors.touch()
        settings.write_text(json.dumps(also_into(errors, logging)))
        try:
            yield settings
        except (RuntimeError, ValueError) as error:
            what = explanation(errors.read_text(errors="replace") + str(error), recipe, gpu)
            if what is None:
                raise
            raise OutOfMemory(what) from error


def also_into(file: Path, logging: Mapping) -> dict:
    """The same, but what is an error also goes into a file."""
    handler = {"class": "logging.FileHandler", "filename": str(file), "level": "ERROR"}
    vllm = logging["loggers"]["vllm"]
    return {
        **logging,
        "handlers": {**logging["handlers"], "file": handler},
        "loggers": {**logging["loggers"], "vllm": {**vllm, "handlers": [*vllm["handlers"], "file"]}},
    }


def explanation(said: str, recipe: Recipe, gpu: bool) -> str | None:
    """What vLLM's processes said, in one line with what to change; None where it is not about memory."""
    sampler, data, sampling = recipe.sampler, recipe.data, recipe.sampling
    share = f"sampler.cpu_kv_cache_gb (now {sampler.cpu_kv_cache_gb:g})"
    wider, others = "", "or end other programs"
    if gpu:
        share = f"sampler.gpu_memory (now {sampler.gpu_memory:g})"
        wider = f" or sampler.tensor_parallel (now {sampler.tensor_parallel})"
        others = f"end what else uses the GPU, or raise{wider.removeprefix(' or')}"
    if found := NO_ROOM.search(said):
        lengths = (
            f"data.max_prompt_tokens (now {data.max_prompt_tokens}), sampling.max_tokens (now {sampling.max_tokens})"
        )
        return f"vLLM has too little memory for its KV cache: {found[0]}; raise {share}{wider}, or lower {lengths}"
    if found := TAKEN.search(said):
        return f"vLLM ran out of memory: {' '.join(found[0].split())}; lower {share}, {others}"
    return None
