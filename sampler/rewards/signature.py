"""What a reward function looks like: TRL's signature, or verl's or OpenRLHF's, which are called as if they had TRL's.

Which of them it is, its parameters say. What these mean is fixed by those projects: their functions run as they are.
"""

import asyncio
import inspect
from collections.abc import Callable, Collection

from protocol.errors import UserError
from sampler.rewards.builtin import text_of

GIVEN = ("prompts", "completions", "completion_ids", "finish_reasons")
"""Lists of one value for each completion, as TRL gives them; `finish_reasons` (ours) holds `stop` or `length`."""
VERL = ("data_source", "solution_str", "ground_truth", "extra_info")
OPENRLHF = ("queries", "prompts", "labels")
SIGNATURES = (
    "f(prompts, completions, completion_ids, **columns) -> list (TRL), "
    "f(data_source, solution_str, ground_truth, extra_info=None) -> float or dict with `score` (verl), "
    "f(queries, prompts, labels) -> list or dict with `rewards` (OpenRLHF)"
)


def in_trl_form(reference: str, function: Callable, options: dict) -> Callable:
    """The function itself if it has TRL's signature, else a coroutine function that has, and calls it.

    Raises UserError for an option that it has no parameter for, and for a signature that is none of the three.
    """
    try:
        parameters = dict(inspect.signature(function).parameters)
    except ValueError:  # some of those that are written in C
        raise UserError(f"reward {reference}: its signature is not readable; wrap it in a function of yours") from None
    takes_all = any(item.kind is item.VAR_KEYWORD for item in parameters.values())
    if not any(item.kind in (item.POSITIONAL_ONLY, item.VAR_POSITIONAL) for item in parameters.values()):
        for mark, names, wrap in (("solution_str", VERL, _from_verl), ("queries", OPENRLHF, _from_openrlhf)):
            if mark in parameters and "completions" not in parameters:
                _check_options(reference, parameters, options, {*names} - {"data_source"}, takes_all)
                _check_needs(reference, parameters, (*names, *options))
                return wrap(function, parameters, options)
        if takes_all or set(GIVEN) & set(parameters):
            _check_options(reference, parameters, options, GIVEN, any_name=False)
            return function
    shown = ", ".join(str(item).partition(":")[0] for item in parameters.values())
    raise UserError(f"reward {reference}: the function takes ({shown}); expected one of {SIGNATURES}")


def _check_options(reference: str, parameters: dict, options: dict, given: Collection[str], any_name: bool) -> None:
    """`**columns` of TRL's functions would swallow a misspelling; the `**kwargs` of the others are for options."""
    for option in options:
        if option in given or (option not in parameters and not any_name):
            known = [name for name, item in parameters.items() if item.default is not item.empty]
            raise UserError(
                f"reward {reference}: the function has no parameter for the option {option!r}; "
                f"it has: {', '.join(known) or 'none'}"
            )


def _check_needs(reference: str, parameters: dict, known: Collection[str]) -> None:
    for name, item in parameters.items():
        if item.default is item.empty and item.kind is not item.VAR_KEYWORD and name not in known:
            raise UserError(f"reward {reference}: the function needs {name!r}; give it as an option")


def _from_verl(function: Callable, parameters: dict, options: dict) -> Callable:
    """One call for each completion; a dict's other entries are left out.

    `data_source` is the column of that name, or "unknown". `ground_truth` is that of the column `reward_model`, or the
    column `answer`. `extra_info` is the column of that name, or all columns.
    """

    async def scores(completions: list, answer: list, **columns: list) -> list:
        results = []
        for index, completion in enumerate(completions):
            row = {name: column[index] for name, column in columns.items() if name not in (*GIVEN, *options)}
            own = {
                "data_source": row.get("data_source", "unknown"),
                "solution_str": text_of(completion),
                "ground_truth": _ground_truth(row, answer[index]),
                "extra_info": row.get("extra_info", row | {"answer": answer[index]}),
            }
            results.append(function(**(_named(own, parameters) | options)))
        if any(map(inspect.isawaitable, results)):
            results = await asyncio.gather(*results)
        return [_entry(result, "score") for result in results]

    return scores


def _from_openrlhf(function: Callable, parameters: dict, options: dict) -> Callable:
    """`labels` is the column `answer`. A prompt is the text of its messages, each with a line end, without the marks of
    the chat template; a query is a prompt and a completion."""

    async def scores(prompts: list, completions: list, answer: list, **columns: list) -> object:
        texts = [_prompt_text(prompt) for prompt in prompts]
        queries = [text + text_of(completion) for text, completion in zip(texts, completions, strict=True)]
        own = {"queries": queries, "prompts": texts, "labels": answer}
        values = function(**(_named(own, parameters) | options))
        values = _entry(await values if inspect.isawaitable(values) else values, "rewards")
        return values.tolist() if hasattr(values, "tolist") else values  # a tensor or an array

    return scores


def _named(values: dict, parameters: dict) -> dict:
    """Those that the function names, or all with `**kwargs`."""
    takes_all = any(item.kind is item.VAR_KEYWORD for item in parameters.values())
    return values if takes_all else {name: value for name, value in values.items() if name in parameters}


def _ground_truth(row: dict, answer: object) -> object:
    """A GSM8K answer becomes what verl's preparation of GSM8K makes of it: the number without commas."""
    model = row.get("reward_model")
    if isinstance(model, dict) and "ground_truth" in model:
        return model["ground_truth"]
    final = str(answer).rpartition("####")
    return final[2].strip().replace(",", "") if final[1] else answer


def _prompt_text(prompt: str | list[dict[str, str]]) -> str:
    return prompt if isinstance(prompt, str) else "".join(f"{message['content']}\n" for message in prompt)


def _entry(value: object, name: str) -> object:
    if not isinstance(value, dict):
        return value
    if name not in value:
        raise TypeError(f"the function returned a dict without {name!r}; it has: {', '.join(map(str, value))}")
    return value[name]
