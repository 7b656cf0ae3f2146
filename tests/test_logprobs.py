"""Log-probs of packed tokens equal what a plain forward pass says, forward and backward."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from policy.logprobs import SelectedLogprobs, TokenLogprobs, pack
from tests.tiny import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return AutoModelForCausalLM.from_pretrained(make_model(tmp_path_factory.mktemp("tiny")), dtype=torch.float32)


def sequences(count: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(seed)
    return [
        (random.integers(0, 300, random.integers(1, 20)), random.integers(0, 300, random.integers(1, 30)))
        for _ in range(count)
    ]


def plain(model, prompt: np.ndarray, completion: np.ndarray, temperature: float) -> torch.Tensor:
    """Ten lines that anyone can check: one sequence alone, full logits, float64 softmax."""
    ids = torch.from_numpy(np.concatenate([prompt, completion]))[None]
    logits = model(input_ids=ids).logits[0].double() / temperature
    logprobs = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
    return logprobs.gather(1, torch.from_numpy(completion)[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [3, 1000])
@pytest.mark.parametrize("attention", ["varlen", "sdpa"])
def test_packed_chunked_logprobs_equal_each_sequence_alone(model, temperature, chunk, attention):
    batch = sequences(5)
    packed = pack([(prompt, [completion]) for prompt, completion in batch])
    found, entropies = TokenLogprobs(model, temperature, chunk, attention)(packed)
    model.set_attn_implementation("sdpa")
    expected = torch.cat([plain(model, prompt, completion, temperature) for prompt, completion in batch])
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=0)
    assert (entropies >= 0).all() and entropies.shape == found.shape


def test_a_neighbour_in_the_row_changes_nothing(model):
    first, second = sequences(2)
    scorer = TokenLogprobs(model, 1.0, 64)
    alone = scorer(pack([(first[0], [first[1]])]))[0]
    together = scorer(pack([(second[0], [second[1]]), (first[0], [first[1]])]))[0][len(second[1]) :]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_completions_that_share_a_prompt_are_scored_as_if_alone(model):
    """And the prompt is computed once: that is what makes small groups of long prompts cheap."""
    prompt, completions = np.arange(17), [np.arange(20, 29), np.array([3]), np.arange(40, 60)]
    packed = pack([(prompt, completions), (prompt[:3], completions[:1])])
    found, _ = TokenLogprobs(model, 1.0, 8)(packed)
    pairs = [*((prompt, completion) for completion in completions), (prompt[:3], completions[0])]
    expected = torch.cat([plain(model, *pair, 1.0) for pair in pairs])
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=0)
    assert packed.input_ids.shape[1] == 17 + 8 + 0 + 19 + 3 + 8


@pytest.mark.parametrize("chunk", [2, 100])
def test_the_gradient_equals_autograd_through_full_logits_in_float64(chunk):
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    targets, outer = torch.randint(0, 11, (7,)), torch.randn(7)
    logprobs, entropies = SelectedLogprobs.apply(hidden, weight, targets, 0.8, chunk)
    full = torch.log_softmax(hidden @ weight.T / 0.8, -1)
    ours = {"logprobs": logprobs, "entropies": entropies, "both": logprobs + 3 * entropies}
    chosen, entropy = full.gather(1, targets[:, None])[:, 0], -(full.exp() * full).sum(1)
    plain = {"logprobs": chosen, "entropies": entropy, "both": chosen + 3 * entropy}
    for name in ours:
        found = torch.autograd.grad((ours[name] * outer).sum(), [hidden, weight], retain_graph=True)
        expected = torch.autograd.grad((plain[name] * outer).sum(), [hidden, weight], retain_graph=True)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("outside", [-1, 11])
def test_a_target_outside_the_vocabulary_has_no_log_prob(outside):
    hidden, weight = torch.randn(2, 5), torch.randn(11, 5)
    logprobs, _ = SelectedLogprobs.apply(hidden, weight, torch.tensor([3, outside]), 1.0, 1)
    assert logprobs.isfinite().tolist() == [True, False]


def test_logits_of_all_tokens_never_exist_together(model):
    """The largest tensor saved for backward is smaller than [tokens, vocabulary]."""
    sizes = []
    batch = [(np.arange(4), [np.arange(200) % 300])]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        TokenLogprobs(model, 1.0, 8)(pack(batch))
    assert max(sizes) < 200 * model.config.vocab_size
