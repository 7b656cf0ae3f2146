"""`model.dtype = "auto"`: which dtype a machine computes faster, and that a run keeps what it began with."""

import pytest

from protocol import dtypes
from protocol.dtypes import cpu_dtype, dtype_advice, faster_dtype
from protocol.errors import UserError
from protocol.resolve import dump, load
from protocol.rundir import resolve_recipe
from tests.golden import tiny

CPUS = {
    "AMD with AVX512-BF16": ("AuthenticAMD", "fpu avx2 avx512f avx512_bf16", "bfloat16"),
    "AMD without": ("AuthenticAMD", "fpu avx2", "float32"),
    "Intel with AMX": ("GenuineIntel", "fpu avx2 avx512_bf16 amx_bf16 amx_tile", "bfloat16"),
    "Intel without": ("GenuineIntel", "fpu avx2 avx512f avx512_bf16", "float32"),
}


@pytest.fixture
def cpu(tmp_path, monkeypatch):
    """Makes this machine one without GPUs, of this vendor and with these flags."""

    def become(vendor: str, flags: str) -> None:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: {flags}\n")
        monkeypatch.setattr(dtypes, "CPUINFO", tmp_path / "cpuinfo")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    return become


@pytest.mark.parametrize("name", CPUS)
def test_auto_is_what_the_processor_multiplies_faster(cpu, name):
    vendor, flags, expected = CPUS[name]
    cpu(vendor, flags)
    assert faster_dtype() == expected
    recipe = load(None, ["model.dtype=auto"])
    assert recipe.model.dtype == expected and load(None, []).model.dtype == "bfloat16"
    assert (dtype_advice(load(None, [])) is None) == (expected == "bfloat16") and dtype_advice(recipe) is None


def test_with_a_gpu_it_is_bfloat16_and_without_cpuinfo_float32(monkeypatch, tmp_path):
    monkeypatch.setattr(dtypes, "CPUINFO", tmp_path / "nothing")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert faster_dtype() == "float32"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # as DeepSpeed's launcher sets it everywhere
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert faster_dtype() == "float32"
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert faster_dtype() == "bfloat16"


def test_a_run_goes_on_in_the_dtype_that_it_began_with_on_any_machine(cpu, tmp_path):
    recipe = tmp_path / "auto.toml"
    recipe.write_text('name = "x"\n[model]\ndtype = "auto"\n')
    cpu(*CPUS["AMD with AVX512-BF16"][:2])
    rundir, begun = resolve_recipe(tmp_path / "run", recipe, [])
    assert begun.model.dtype == "bfloat16" and 'dtype = "bfloat16"' in dump(load(rundir.recipe))
    cpu(*CPUS["AMD without"][:2])
    assert resolve_recipe(tmp_path / "run", recipe, [])[1] == begun
    with pytest.raises(UserError, match=r"started with another \[model\]"):
        resolve_recipe(tmp_path / "run", recipe, ["model.dtype=float32"])


@pytest.mark.slow
@pytest.mark.long
def test_a_rank_says_where_the_other_dtype_is_faster(tmp_path):
    words = ["--replay", str(tiny.record(tmp_path)), "--set", "trainer.steps=1", "--set"]
    slow = tiny.replayed(tmp_path / "bfloat16", *words, "model.dtype=bfloat16")
    assert ("computes float32 faster" in slow) == (cpu_dtype() == "float32")
    assert "computes float32 faster" not in tiny.replayed(tmp_path / "auto", *words, "model.dtype=auto")
