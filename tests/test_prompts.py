"""Rows of every accepted shape become the ids of the chat template, or one line of complaint."""

import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from protocol.errors import UserError
from protocol.recipe import Data
from sampler.demonstrations import demonstrated
from sampler.prompts import Prompt, fingerprint, load_prompts, load_rows
from sampler.rewards.builtin import format_think_answer as well_formed
from sampler.rewards.builtin import gsm8k
from tests.tiny import make_tokenizer

GSM8K = Path(__file__).resolve().parents[2] / "shared/data/gsm8k/train.jsonl"
BARE = Data(system="", max_prompt_tokens=4096)
QUESTION = {"question": "2 + 2?", "answer": "2 + 2 = 4\n#### 4"}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def written(directory: Path, rows: list[dict], name: str = "rows.jsonl") -> str:
    path = directory / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def only(directory: Path, row: dict, tokenizer, data: Data = BARE):
    (prompt,) = load_prompts(written(directory, [row]), 0, data, tokenizer)
    return prompt


def refusal(source: str, tokenizer, data: Data = BARE, limit: int = 0) -> str:
    with pytest.raises(UserError) as refused:
        load_prompts(source, limit, data, tokenizer)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_prompt_ends_where_the_assistant_begins(tmp_path, tokenizer):
    """Ancestor defect 3: without the generation prompt the model must invent that header."""
    prompt = only(tmp_path, QUESTION, tokenizer)
    assert tokenizer.decode(prompt.ids) == ("<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n")
    assert prompt.ids.dtype == np.int32
    assert list(prompt.ids).count(tokenizer.bos_token_id) == 2  # special tokens, not their letters


def test_system_message_and_worked_examples_come_before_the_question(tmp_path, tokenizer):
    prefix = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "#### 2"}]
    data = Data(system="Be brief.", prefix=prefix, template="Q: {question}\n\\boxed{} {answer}")
    prompt = only(tmp_path, {"question": "{answer}?", "answer": "4"}, tokenizer, data)
    assert prompt.messages == [
        {"role": "system", "content": "Be brief."},
        *prefix,
        {"role": "user", "content": "Q: {answer}?\n\\boxed{} 4"},  # filled once, other braces kept
    ]
    assert tokenizer.decode(prompt.ids).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")


@pytest.mark.parametrize(
    ("row", "question", "columns"),
    [
        (QUESTION, "2 + 2?", QUESTION),
        ({"prompt": "Add.", "solution": "4"}, "Add.", {"solution": "4"}),
        (
            {"prompt": [{"role": "user", "content": "Add.", "name": None}], "level": 3},
            "Add.",
            {"level": 3},
        ),
        (
            {
                "data_source": "gsm8k",
                "prompt": [{"role": "user", "content": "Add."}],
                "reward_model": {"style": "rule", "ground_truth": "4"},
            },
            "Add.",
            {
                "data_source": "gsm8k",
                "reward_model": {"style": "rule", "ground_truth": "4"},
                "answer": "4",
            },
        ),
    ],
    ids=["gsm8k", "trl string", "trl messages", "verl"],
)
def test_rows_of_each_convention_give_the_question_and_the_other_columns(tmp_path, tokenizer, row, question, columns):
    prompt = only(tmp_path, row, tokenizer)
    assert prompt.messages == [{"role": "user", "content": question}]
    assert prompt.columns == columns


def test_a_verl_file_is_read_as_verl_writes_it(tmp_path, tokenizer):
    """The schema of verl's examples/data_preprocess/gsm8k.py, written by `datasets` as there."""
    rows = [
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": f"{number} + 1? Let's think."}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(number + 1)},
            "extra_info": {"split": "train", "index": number, "answer": f"#### {number + 1}", "question": "?"},
        }
        for number in range(3)
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    prompts = load_prompts(str(tmp_path / "train.parquet"), 0, BARE, tokenizer)
    assert [prompt.messages[0]["content"] for prompt in prompts] == [f"{n} + 1? Let's think." for n in range(3)]
    assert [prompt.columns["answer"] for prompt in prompts] == ["1", "2", "3"]
    assert prompts[2].columns["extra_info"] == rows[2]["extra_info"]
    assert "message" in refusal(str(tmp_path / "train.parquet"), tokenizer, Data(template="Q: {prompt}"))


@pytest.mark.parametrize("asked", ["7 + 1?", [{"role": "user", "content": "7 + 1?"}]], ids=["text", "messages"])
def test_openrlhf_rows_are_read_by_the_names_of_their_keys(tmp_path, tokenizer, asked):
    row = {"input": asked, "label": "8", "datasource": "sums"}
    keys = Data(system="", prompt="input", answer="label")
    prompt = only(tmp_path, row, tokenizer, keys)
    assert prompt.messages == [{"role": "user", "content": "7 + 1?"}]
    assert prompt.columns == {"label": "8", "datasource": "sums", "answer": "8"}
    source = str(tmp_path / "rows.jsonl")
    assert "no column 'question' for data.template; it has: input, label, datasource; set data.prompt" in refusal(
        source, tokenizer
    )
    wrong = [Data(system="", prompt="context"), Data(system="", prompt="input", answer="gold")]
    for data, complaint in zip(wrong, ["'context' for data.prompt", "'gold' for data.answer"], strict=True):
        assert f"has no column {complaint}; it has: input, label, datasource" in refusal(source, tokenizer, data)


def test_an_input_template_is_filled_with_the_column_that_asks(tmp_path, tokenizer):
    data = Data(system="", prompt="input", template="Q: {input}\nA:")
    assert only(tmp_path, {"input": "7 + 1?"}, tokenizer, data).messages[0]["content"] == "Q: 7 + 1?\nA:"


def test_trl_rows_hand_all_other_columns_to_the_rewards(tmp_path, tokenizer):
    row = {"prompt": [{"role": "user", "content": "7 + 1?"}], "solution": "$8$", "level": 2}
    columns = only(tmp_path, row, tokenizer, Data(system="", answer="solution")).columns
    assert columns == {"solution": "$8$", "level": 2, "answer": "$8$"}
    rows = [row, row | {"solution": None}]
    complaint = refusal(written(tmp_path, rows), tokenizer, Data(system="", answer="solution"))
    assert "row 1 (from 0) has no gold answer in the column `solution` (1 of 2 rows)" in complaint


def test_a_template_of_ones_own_wins_over_a_prompt_column(tmp_path, tokenizer):
    data = Data(system="", template="{prompt} Think.")
    assert only(tmp_path, {"prompt": "Add."}, tokenizer, data).messages[0]["content"] == "Add. Think."


def test_a_rows_own_system_message_stays_first_and_never_meets_another(tmp_path, tokenizer):
    own = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    prefix = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    prompt = only(tmp_path, {"prompt": own}, tokenizer, Data(system="", prefix=prefix))
    assert [message["content"] for message in prompt.messages] == ["S", "1", "2", "U"]
    assert 'set data.system = ""' in refusal(str(tmp_path / "rows.jsonl"), tokenizer, Data())


def test_without_a_chat_template_a_string_is_the_whole_prompt(tmp_path):
    plain = make_tokenizer()
    plain.chat_template = None
    prompt = only(tmp_path, {"prompt": "Once upon"}, plain)
    assert prompt.messages == plain.decode(prompt.ids) == "Once upon"
    assert "no chat template" in refusal(str(tmp_path / "rows.jsonl"), plain, Data(system="S"))


@pytest.mark.parametrize(
    ("rows", "data", "complaint"),
    [
        ([], BARE, "the data set is empty"),
        (
            [{"problem": "?", "gold": "4"}],
            BARE,
            "no column 'question' for data.template; it has: pr",
        ),
        ([{"question": "?"}, {"question": None}], BARE, "row 1 (from 0) has no column 'question'"),
        ([QUESTION, {"question": "?"}], BARE, "row 1 (from 0) has no gold answer"),
        ([QUESTION, {"question": "?", "answer": ""}], BARE, "row 1 (from 0) has no gold answer"),
        ([{"question": "?", "answer": None}], BARE, "row 0 (from 0) has no gold answer"),
        (
            [{"prompt": [{"role": "user", "content": "?"}], "reward_model": {"style": "rule"}}],
            BARE,
            "row 0 (from 0) has no gold answer",
        ),
        (
            [QUESTION, {"question": "x" * 99, "answer": "4"}],
            Data(system="", max_prompt_tokens=64),
            "row 1 (from 0) has 118 tokens, more than data.max_prompt_tokens = 64",
        ),
        ([{"prompt": []}], BARE, "no column 'question'"),
        ([{"prompt": [{"role": "user"}]}], BARE, "expected messages {role, content}"),
        ([{"prompt": [{"role": "assistant", "content": "4"}]}], BARE, "nothing is left to sample"),
        (
            [{"prompt": [{"role": "user", "content": "?"}]}],
            Data(system="", template="{prompt}!"),
            "remove data.template",
        ),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused_at_the_start(tmp_path, tokenizer, rows, data, complaint):
    assert complaint in refusal(written(tmp_path, rows), tokenizer, data)


def test_a_data_set_without_answers_serves_rewards_that_need_none(tmp_path, tokenizer):
    assert only(tmp_path, {"question": "Write a poem."}, tokenizer).columns == {"question": "Write a poem."}


def test_what_the_chat_template_refuses_is_said_in_one_line(tmp_path):
    strict = make_tokenizer()
    strict.chat_template = "{{ raise_exception('System role not supported') }}"
    complaint = refusal(written(tmp_path, [QUESTION]), strict)
    assert "chat template refuses the messages: System role not supported" in complaint


def test_limit_takes_the_first_rows(tmp_path, tokenizer):
    rows = [{"question": str(index), "answer": "4"} for index in range(5)]
    source = written(tmp_path, rows)
    assert load_rows(source, 2) == rows[:2]
    assert load_rows(source, 0) == load_rows(source, 9) == rows
    assert len(load_prompts(source, 3, BARE, tokenizer)) == 3


def test_a_parquet_file_reads_like_the_same_rows_in_jsonl(tmp_path, tokenizer):
    rows = [{"prompt": [{"role": "user", "content": f"{i}?"}], "answer": str(i)} for i in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    same = [
        load_prompts(source, 0, BARE, tokenizer) for source in (written(tmp_path, rows), str(tmp_path / "rows.parquet"))
    ]
    assert fingerprint(same[0]) == fingerprint(same[1])
    assert len(load_rows(str(tmp_path / "rows.parquet"), 2)) == 2


def test_a_saved_data_set_directory_is_read_by_split(tmp_path):
    one = datasets.Dataset.from_list([{"question": "a"}, {"question": "b"}])
    two = datasets.Dataset.from_list([{"question": "c"}])
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": two}).save_to_disk(tmp_path / "many")
    assert load_rows(str(tmp_path / "one"), 0) == one.to_list()
    assert load_rows(str(tmp_path / "many"), 1) == [{"question": "a"}]
    assert load_rows(f"{tmp_path / 'many'}:test", 0) == two.to_list()
    with pytest.raises(UserError, match="cannot load the data set"):
        load_rows(f"{tmp_path / 'many'}:validation", 0)


def test_a_directory_of_files_is_read_by_split(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "files").mkdir()
    written(tmp_path / "files", [QUESTION], "train.jsonl")
    written(tmp_path / "files", [QUESTION, QUESTION], "test.jsonl")
    assert len(load_rows(f"{tmp_path / 'files'}:test", 0)) == 2
    assert len(load_rows(f"{tmp_path / 'files'}:default:train", 0)) == 1
    assert load_rows(f"{tmp_path / 'files'}:test[-1:]", 0) == [QUESTION]
    assert load_rows(f"{tmp_path / 'files'}:test[:50%]", 0) == [QUESTION]


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("nowhere.jsonl", "cannot read the data set nowhere.jsonl: No such file"),
        ("nowhere.parquet", "cannot read the data set nowhere.parquet: No such file"),
        ("./nowhere", "no directory nowhere"),
        ("data.csv", "convert it to .jsonl or .parquet"),
        ("bad.jsonl", "bad.jsonl: line 2 is no JSON"),
        ("list.jsonl", "list.jsonl: line 1 is no JSON object"),
        ("bad.parquet", "bad.parquet is no parquet file"),
    ],
)
def test_a_source_that_cannot_be_read_is_named(tmp_path, monkeypatch, tokenizer, source, complaint):
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text('{"question": "?"}\n{"question": \n')
    Path("list.jsonl").write_text("[1, 2]\n")
    Path("bad.parquet").write_text("no parquet at all, but long enough to be one")
    assert complaint in refusal(source, tokenizer)


def test_dates_become_text_and_bytes_are_refused(tmp_path, tokenizer):
    day = pyarrow.array(["2024-02-29"]).cast(pyarrow.date32())
    path = str(tmp_path / "rows.parquet")
    parquet.write_table(pyarrow.table({"question": ["?"], "day": day}), path)
    assert load_prompts(path, 0, BARE, tokenizer)[0].columns["day"] == "2024-02-29"
    parquet.write_table(pyarrow.table({"question": ["?"], "image": [b"\x89PNG"]}), path)
    assert "a column holds bytes" in refusal(path, tokenizer)


def test_the_fingerprint_follows_ids_columns_and_order(tmp_path, tokenizer):
    rows = [{"question": "a", "answer": "1"}, {"question": "b", "answer": "2"}]

    def of(rows: list[dict], data: Data = BARE) -> str:
        return fingerprint(load_prompts(written(tmp_path, rows), 0, data, tokenizer))

    same = of(rows)
    assert len(same) == 64
    assert same == of([{"answer": "1", "question": "a"}, rows[1]])  # the order of keys says nothing
    assert same != of(rows[::-1])
    assert same != of(rows[:1])
    assert same != of(rows, Data(system="Be brief."))
    assert same != of([rows[0], {"question": "b", "answer": "3"}])


def test_prompts_that_are_the_same_bytes_in_a_row_have_different_fingerprints():
    def prompt(ids: bytes) -> Prompt:
        return Prompt(ids=np.frombuffer(ids, np.int32), messages="", columns={})

    assert fingerprint([prompt(b"")] * 3) != fingerprint([prompt(b"{}{}")])


def test_generated_word_problems_come_in_two_splits():
    pytest.importorskip("sampler.problems", reason="sampler/problems.py is not there yet")
    train, test = load_rows("word-problems", 0), load_rows("word-problems:test", 0)
    assert (len(train), len(test)) == (4000, 400)
    assert load_rows("word-problems:train", 7) == train[:7]
    with pytest.raises(UserError, match="no split 'dev'; there are train, test"):
        load_rows("word-problems:dev", 0)


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"no {GSM8K}")
def test_all_of_gsm8k_becomes_prompts_with_their_answers(tokenizer):
    prompts = load_prompts(str(GSM8K), 0, BARE, tokenizer)
    assert len(prompts) == 7473
    assert all("####" in prompt.columns["answer"] for prompt in prompts)
    assert not any("####" in tokenizer.decode(prompt.ids) for prompt in prompts)  # no gold leaks


SOLVED = {"question": "2 + 2?", "answer": "Two and two: <<2+2=4>>4.\n#### 4"}
FORM = "<think>{reasoning}</think><answer>{final}</answer>"


def shown(directory: Path, rows: list[dict], tokenizer, form: str = FORM, max_tokens: int = 999) -> list[Prompt]:
    data = Data(train=written(directory, rows), system="", max_prompt_tokens=4096, demonstration=form)
    prompts = load_prompts(data.train, 0, data, tokenizer)
    return demonstrated(prompts, data, tokenizer, [tokenizer.eos_token_id], max_tokens)


def no_demonstration(*arguments, **settings) -> str:
    with pytest.raises(UserError) as refused:
        shown(*arguments, **settings)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_prompt_and_demonstration_are_the_rendered_conversation_up_to_the_end_of_the_turn(tmp_path, tokenizer):
    [prompt] = shown(tmp_path, [SOLVED], tokenizer)
    said = "<think>Two and two: 4.</think><answer>4</answer>"
    whole = tokenizer.apply_chat_template([*prompt.messages, {"role": "assistant", "content": said}], tokenize=False)
    assert tokenizer.decode([*prompt.ids, *prompt.demonstration]) + "\n" == whole
    assert prompt.demonstration[-1] == tokenizer.eos_token_id and prompt.demonstration.dtype == np.int32
    assert prompt.demonstration_text == said


def test_a_rows_own_columns_win_over_those_made_of_its_answer(tmp_path, tokenizer):
    [prompt] = shown(tmp_path, [SOLVED | {"final": "four"}], tokenizer, "{reasoning} {final}")
    assert prompt.demonstration_text == "Two and two: 4. four"


def test_without_a_chat_template_the_tokenizers_end_of_sequence_follows(tmp_path):
    plain = make_tokenizer()
    plain.chat_template = None
    [prompt] = shown(tmp_path, [SOLVED], plain, " It is {final}.")
    assert plain.decode([*prompt.ids, *prompt.demonstration]) == "2 + 2? It is 4.<|im_end|>"


def test_a_demonstration_that_the_template_changes_is_a_warning_and_what_it_became_is_learned(tmp_path, caplog):
    trims = make_tokenizer()
    trims.chat_template = trims.chat_template.replace("message['content']", "message['content'] | trim")
    [prompt] = shown(tmp_path, [SOLVED], trims, " {final} ")
    assert prompt.demonstration_text == "4"
    assert "changes 1 of 1 demonstrations; the first of them becomes '4'" in caplog.text


@pytest.mark.parametrize(
    ("rows", "form", "complaint"),
    [
        (
            [SOLVED, {"question": "?", "answer": "4"}],
            FORM,
            "row 1 (from 0) has no column 'reasoning' for data.demonstr",
        ),
        ([SOLVED, SOLVED], "{final}<|im_end|>{final}", "holds an end-of-sequence token in the middle (2 of 2 rows)"),
        (
            [SOLVED, SOLVED | {"final": "x" * 50}],
            "{final}",
            "row 1 (from 0): the demonstration has 51 tokens, more than",
        ),
    ],
)
def test_rows_that_demonstrate_nothing_are_refused_at_the_start(tmp_path, tokenizer, rows, form, complaint):
    assert complaint in no_demonstration(tmp_path, rows, tokenizer, form, max_tokens=50)


@pytest.mark.parametrize(
    ("wrong", "right", "complaint"),
    [
        ("<|im_end|>", "", "is closed by no end-of-sequence token of the chat template (1 of 1 rows)"),
        ("assistant", "model", "does not begin with the prompt's tokens when it is rendered together with it"),
    ],
)
def test_templates_that_cannot_demonstrate_are_refused(tmp_path, wrong, right, complaint):
    other = make_tokenizer()
    other.chat_template = other.chat_template.replace(wrong, right)
    assert complaint in no_demonstration(tmp_path, [SOLVED], other)


def test_the_fingerprint_follows_demonstrations(tmp_path, tokenizer):
    of = [fingerprint(shown(tmp_path, [SOLVED, SOLVED], tokenizer, form)) for form in ("{final}", "{reasoning}")]
    assert len({*of, fingerprint(load_prompts(str(tmp_path / "rows.jsonl"), 0, BARE, tokenizer))}) == 3


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"no {GSM8K}")
def test_gsm8ks_own_solutions_deserve_full_marks(tokenizer):
    data = Data(train=str(GSM8K), system="", max_prompt_tokens=4096, demonstration=FORM)
    prompts = demonstrated(
        load_prompts(data.train, 500, data, tokenizer), data, tokenizer, [tokenizer.eos_token_id], 4096
    )
    texts, answers = [prompt.demonstration_text for prompt in prompts], [prompt.columns["answer"] for prompt in prompts]
    assert len(prompts) == 500
    assert set(gsm8k(texts, answers)) == set(well_formed(texts)) == {1.0}
    assert not any("<<" in text or "####" in text for text in texts)
