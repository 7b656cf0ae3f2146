"""The recipe: every setting of a run, its unit and its default, on one page.

A recipe is a TOML file with the tables below; both workers read the same one. The defaults are the seed
experiment: Qwen2.5-1.5B-Instruct on GSM8K, answer and format rewarded. `protocol/resolve.py` reads the file.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct, field

Positive = Annotated[int, Meta(ge=1)]
NonNegative = Annotated[int, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Rate = Annotated[float, Meta(ge=0)]
Seconds = Annotated[float, Meta(gt=0)]
Extractor = Literal["marks", "heading", "boxed", "tag", "last"]
"""`sampler/rewards/answers.py` says what each of them takes for the answer."""


THINK = (
    "Solve the user's problem. First reason step by step inside <think> and </think>, then give only the final "
    "number inside <answer> and </answer>, like this: <think>reasoning</think><answer>42</answer>"
)


class Table(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One table of the recipe; an unknown key is an error."""


class Model(Table, frozen=True):
    """The policy before the first step, and with `kl_beta` > 0 the reference."""

    path: str = "Qwen/Qwen2.5-1.5B-Instruct"
    """Hub id, local directory, .gguf file, or `smollm2-135m-instruct` (embedded)."""
    revision: str | None = None
    dtype: Literal["auto", "bfloat16", "float32"] = "bfloat16"
    """auto: bfloat16 or float32, whichever the machine on which the run begins computes faster (`dtypes.py`); all that
    is checked and said later is about that one."""
    quantize: Literal["none", "nf4"] = "none"
    """nf4: the trainer keeps the base of adapters in 4 bits (QLoRA, arXiv 2305.14314); samplers load its values."""


class Lora(Table, frozen=True):
    """Low-rank adapters (arXiv 2106.09685) instead of full fine-tuning when `rank` > 0."""

    rank: NonNegative = 0
    alpha: Positive = 64
    dropout: Fraction = 0.0
    targets: str | list[str] = "all-linear"


class Data(Table, frozen=True):
    """Where prompts come from and how a row becomes messages."""

    train: str = "openai/gsm8k:main:train"
    """`hub/id[:config][:split]`, a .jsonl or .parquet file, or `word-problems[:split]` (generated)."""
    eval: str = "openai/gsm8k:main:test"
    limit: NonNegative = 0
    """Use the first `limit` training rows only; 0 means all."""
    eval_limit: NonNegative = 0
    system: str | None = THINK
    """The system message; "" leaves it out."""
    template: str = "{question}"
    """The user message; `{column}` is replaced by that column of the row."""
    prompt: str = "prompt"
    """The column that holds the question as text or messages; rows without it are asked through the template."""
    answer: str = "answer"
    """The column that holds the right answer; verl's `reward_model.ground_truth` is found without it."""
    prefix: list[dict[str, str]] = []
    """Messages between the system message and the user's: worked examples."""
    max_prompt_tokens: Positive = 512
    demonstration: str = ""
    """Objective `sft`: the assistant's message to learn from, `{column}` replaced as in `template`."""


class Sampling(Table, frozen=True):
    group_size: Annotated[int, Meta(ge=1)] = 8
    """Completions per prompt; 1 with the objective `sft`."""
    max_tokens: Positive = 512
    """Tokens per completion; longer ones are cut and marked `length`."""
    temperature: Annotated[float, Meta(gt=0)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """Less than 1, like the three settings below it, changes the policy that samples into another than the one that is
    trained: allowed with `recompute_old_logprobs = true` and `correction = "none"` only."""
    top_k: NonNegative = 0
    """0: all tokens."""
    min_p: Fraction = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0)] = 1.0
    stop: list[str] = []
    """Texts that end a completion; reward functions do not see them."""
    stop_after: list[str] = []
    """Texts that close an answer and so end a completion, `</answer>` for example; reward functions see them."""
    stop_token_ids: list[NonNegative] = []
    """On top of the end-of-sequence tokens of tokenizer and generation configuration."""


class Reward(Table, frozen=True):
    """One reward function; a completion's reward is the weighted sum of all of them."""

    function: str
    """A built-in (docs/rewards.md), `file.py:function` or `package.module:function`."""
    weight: float = 1.0
    options: dict[str, float | int | str | bool] = {}
    """Keyword arguments passed on to the function."""
    timeout_s: Seconds = 10.0
    """For one group; then the process that runs it is killed."""


def seed_rewards() -> list[Reward]:
    return [
        Reward(function="gsm8k", options={"correct": 1.0, "wrong": -1.0}),
        Reward(function="format_think_answer", options={"correct": 1.25, "wrong": -1.0}),
    ]


class Evaluation(Table, frozen=True):
    """Held-out accuracy: the share of completions to which the first reward function gives more than 0."""

    before: bool = True
    after: bool = True
    every: NonNegative = 0
    """Steps between two evaluations beside training; 0: none."""
    temperature: Rate = 0.0
    """0 is greedy."""
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    samples: Positive = 1
    """Completions per held-out prompt; with n > 1 also pass@k and maj@k."""
    extractors: list[Extractor] = field(default_factory=lambda: ["marks", "last"])
    """Ways to find the final number in a completion, each with an accuracy of its own; the first one votes in maj@k."""
    patience: NonNegative = 0
    """Evaluations in a row without a new best after which training ends; 0: never."""


class SamplerTable(Table, frozen=True):
    gpus: Positive = 1
    """GPUs; without a GPU, engine processes."""
    tensor_parallel: Positive = 1
    """GPUs per engine; `gpus / tensor_parallel` engines run side by side."""
    max_running: Positive = 256
    """Completions that one engine decodes at the same time."""
    gpu_memory: Fraction = 0.85
    """Share of each GPU's memory for weights and KV cache."""
    cpu_kv_cache_gb: Annotated[float, Meta(gt=0)] = 2.0
    threads: NonNegative = 0
    """CPU threads per engine without a GPU; 0 divides the cores evenly."""
    compile: bool = True
    """CUDA graphs and compilation; off starts faster."""
    reward_workers: Positive = 2
    """Processes that run reward functions, one group each at a time."""
    reward_memory_gb: Annotated[float, Meta(gt=0)] = 8.0
    """Of one such process; more is a MemoryError in the function."""


class Objective(Table, frozen=True):
    """The loss; `trainer/loss.py` has the formulas and their sources."""

    name: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "sft"] = "dapo"
    clip_low: Fraction | None = None
    """Unset, this and the next are the objective's own."""
    clip_high: Rate | None = None
    dual_clip: Rate = 0.0
    """Bound of the ratio where the advantage is negative, above 1; 0: none."""
    kl_beta: Rate = 0.04
    """Weight of the KL estimate against the reference; 0 loads no reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    entropy_bonus: Rate = 0.0
    """Weight of the mean token entropy, which the loss then raises."""
    advantage: str | None = None
    """`group`, `mean`, `rloo`, `batch`, `reinforce++` or `file.py:function`; unset: `mean` for dr_grpo, or `group`."""
    mask_truncated: bool = False
    """Completions that were cut at `max_tokens` are not trained."""
    correction: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "token_truncate"
    """Of the difference between the sampler's log-probs and the trainer's own before the step."""
    correction_cap: Annotated[float, Meta(ge=1)] | None = None
    """Largest weight (truncate), or largest ratio that is trained (mask); unset: 2, for cispo 1 + clip_high."""
    correction_floor: Fraction = 0.0
    """Smallest ratio that is trained (mask)."""
    recompute_old_logprobs: bool = False
    """Three policies: clip against the trainer's own log-probs before the step, weight by old / sampler."""

    @property
    def advantage_name(self) -> str:
        return self.advantage or ("mean" if self.name == "dr_grpo" else "group")


class Optimizer(Table, frozen=True):
    """AdamW (arXiv 1711.05101)."""

    learning_rate: Rate = 1e-6
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    epsilon: Rate = 1e-8
    weight_decay: Rate = 0.0
    warmup_steps: NonNegative = 5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    max_grad_norm: Annotated[float, Meta(gt=0)] = 1.0


class TrainerTable(Table, frozen=True):
    gpus: Positive = 2
    """Ranks; without a GPU, processes."""
    steps: Positive = 200
    prompts_per_step: Positive = 16
    tokens_per_micro_batch: Positive = 8192
    """Packed tokens in one forward pass of one rank."""
    max_staleness: NonNegative = 1
    """Optimizer steps between the weights that sampled a token and the weights that it trains."""
    refill: Rate = 0.0
    """Groups whose rewards are all equal teach nothing: up to `refill * prompts_per_step` of them in a step are
    replaced by others and not trained. 0: they are trained like all."""
    zero_stage: Annotated[int, Meta(ge=0, le=3)] = 1
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Of the ranks' exchange; `auto` tries NCCL, and takes gloo where it fails and on virtual GPUs (docs/vgpu.md)."""
    gradient_checkpointing: bool = True
    attention: Literal["auto", "sdpa", "varlen"] = "auto"
    """varlen: without pairs of tokens that do not see each other; auto: where it works, on GPUs in bfloat16 only."""
    liger: Literal["auto", "on", "off"] = "auto"
    """Fused kernels of the package liger-kernel; auto: on GPUs where it is installed."""
    logits_chunk: Positive = 128
    """As many logits exist at the same time as so many completion positions have."""
    checkpoint_every: Positive = 20
    keep_checkpoints: Positive = 2
    keep_gb: Rate = 0.0
    """Bytes that snapshots and checkpoints may take together, as far as none that is needed must go; 0: no limit."""
    keep_stream: bool = True
    """Keep the groups of every step in `stream/`, for `python -m trainer --replay`."""
    threads: NonNegative = 0
    """CPU threads per rank without a GPU; 0 divides the cores evenly."""


class Network(Table, frozen=True):
    bind: str = "127.0.0.1"
    """Address that the trainer listens on and samplers can reach; a wildcard is refused."""
    port: Annotated[int, Meta(ge=0, le=65535)] = 0
    """0 takes a free one; samplers read it from the run directory."""
    beat_s: Seconds = 5.0
    """A sampler says that it is alive this often."""
    dead_s: Seconds = 30.0
    """Silence after which a peer counts as gone and its leases are given to others."""
    lease_s: Seconds = 900.0
    """A lease whose sampler shows no progress for so long is given to another."""
    resend_s: Seconds = 10.0
    """A group that nobody acknowledged is sent again after this."""
    grace_s: Seconds = 3600.0
    """A sampler without a trainer ends itself after this."""


class Tracking(Table, frozen=True):
    """Where the record is mirrored to. The JSONL files in the run directory are the record; a mirror that fails later
    stops no run."""

    mirrors: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """W&B runs offline unless you are logged in."""
    project: str = "vesper"


class Recipe(Table, frozen=True):
    name: str = "gsm8k"
    seed: NonNegative = 42
    model: Model = Model()
    lora: Lora = Lora()
    data: Data = Data()
    sampling: Sampling = Sampling()
    reward: list[Reward] = field(default_factory=seed_rewards)
    eval: Evaluation = Evaluation()
    sampler: SamplerTable = SamplerTable()
    objective: Objective = Objective()
    optimizer: Optimizer = Optimizer()
    trainer: TrainerTable = TrainerTable()
    network: Network = Network()
    tracking: Tracking = Tracking()
