"""The page about a run: its numbers are those of the records, its texts do nothing, and nothing is fetched."""

import re
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import numpy as np
import pytest

from doctor.history import History
from launch.report.account import Account
from launch.report.command import main, visible
from launch.report.compare import settings
from launch.report.examples import choose
from launch.report.measured import measured
from launch.report.svg import MAX_POINTS, nice, number, thin
from protocol.errors import UserError
from protocol.evaluation import Answered, Evaluation, Sampling, compare, summary
from protocol.metrics import MetricsWriter
from protocol.resolve import load
from protocol.rollout import Rollout
from protocol.rundir import RunDir, resolve_recipe
from protocol.snapshot import snapshot_id
from tests.browser import CHROMIUM, Browser
from tests.groups import make_group
from trainer.figures import of_groups, of_tokens

HOSTILE = (
    '<script>document.title = "owned"</script><img src="http://evil.test/x.png" onerror="alert(1)"></pre></style>'
    "{{ 7 * 7 }} javascript:alert(1) \x1b[31m\x00\u202egnp.exe\x07"
)
VOID = {"meta", "path", "rect", "circle"}


def make_run(path: Path, steps: int = 3, exams: tuple[int, ...] = (), text: str = "#### 5", **settings: str) -> RunDir:
    """A run directory as the two workers leave it, from the classes that they write it with."""
    overrides = ["trainer.steps=3", *(f"{key.replace('__', '.')}={value}" for key, value in settings.items())]
    rundir, _ = resolve_recipe(path, None, overrides)
    with MetricsWriter(rundir.metrics / "trainer.jsonl") as metrics, MetricsWriter(rundir.rollouts / "a.jsonl") as file:
        for step in range(steps + 1):
            if step:
                metrics.write({"kind": "step", "step": step, **figures(step)})
                for completion in range(4):
                    file.write(msgspec.to_builtins(rollout("train", step, step - 1, completion / 4, text)))
            if step in exams:
                result = evaluated(step)
                result.write(rundir.evals / f"{result.snapshot}.json")
                change = compare(evaluated(exams[0]), result) if step > exams[0] else {}
                metrics.write(
                    {"kind": "exam", "step": step, "snapshot": result.snapshot, **summary(result)}
                    | {f"change/{name}": value for name, value in change.items()}
                )
                for row in range(8):
                    file.write(msgspec.to_builtins(rollout("eval", row, step, float(row < 2 * step), text)))
    (rundir.metrics / "prompts.json").write_bytes(msgspec.json.encode({"always": [], "never": [1], "sometimes": [2]}))
    return rundir


def figures(step: int) -> dict[str, float | None]:
    """A step's record: the trainer's own figures, with some that the tests look for."""
    return {
        **of_groups([make_group(step)], step),
        **of_tokens({"mask": np.zeros(0)}),
        "reward": step * 0.1234,
        "frac_reward_zero_std": 0.25,
        "grad_norm": None if step == 2 else 1.5,
        "rewards/gsm8k/mean": -1.0,
        "rewards/format/mean": 1.25,
        "train/tokens": 1000.0,
        "step_time": 1800.0,
        "time/wait_s": 1.0,
        "time/publish_s": 1.0,
        "sampler/tokens_per_s": 100.0,
    }


def rollout(split: str, row: int, step: int, reward: float, text: str) -> Rollout:
    return Rollout(
        split="train" if split == "train" else "eval",
        group=row,
        row=row,
        prompt=[{"role": "system", "content": "Solve."}, {"role": "user", "content": f"row {row}: {text}"}],
        completion=f"{text} at {step}",
        reward=reward,
        rewards={"gsm8k": reward or -1.0, text: None},
        finish="stop" if reward else "length",
        tokens=17,
        gold="5",
        answers={"marks": text},
        snapshots=[snapshot_id(step, 1)],
        seconds=1.0,
    )


def evaluated(step: int) -> Evaluation:
    """Two more of eight prompts are right after each step."""
    rights = [row < 2 * step for row in range(8)]
    prompts = [
        Answered(
            row=row, rewards=[float(right)], correct=[right], answers={"marks": ["5" if right else None]},
            gold="5", truncated=[False], tokens=[17],
        )
        for row, right in enumerate(rights)
    ]  # fmt: skip
    drawn = Sampling(temperature=0.0, top_p=1.0, samples=1, max_tokens=64)
    return Evaluation(
        step=step, snapshot=snapshot_id(step, 1), data="made", fingerprint="f", sampling=drawn, prompts=prompts
    )


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, and text."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = path.read_text()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open += [] if tag in VOID else [tag]
        self.text += " " * (tag in ("td", "th"))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"{tag} at {self.getpos()}"

    def handle_data(self, data):
        self.text += data


def report(*runs: RunDir | Path, out: Path | None = None) -> Page:
    paths = [run.path if isinstance(run, RunDir) else run for run in runs]
    assert main([*map(str, paths), *(["--out", str(out)] if out else [])]) == 0
    return Page(out or paths[0] / "report.html")


def test_the_numbers_are_those_of_the_records(tmp_path):
    page = report(make_run(tmp_path / "one", exams=(0, 3)))
    text = re.sub(r"\s+", " ", page.text)
    assert "0.000 [0.000, 0.324] (n=8)" in text and "0.750 [0.409, 0.929] (n=8) at step 3" in text
    assert "6 prompts won, 0 lost" in text and "5 of 6 prompts won" in text
    assert "1h30m in 3 steps" in text and "4.5 device-hours" in text and "3000 trained" in text
    assert "0.06 device-hours" in text  # 4.5 for 75 points
    assert "0.123 \N{RIGHTWARDS ARROW} 0.37" in text  # reward, first and last
    assert "0 were always solved, 1 sometimes and 1 never" in text
    labels = [attributes["aria-label"] for tag, attributes in page.elements if attributes.get("role") == "img"]
    assert "Signal. one: 0.75 at step 1, 0.75 at step 3." in labels
    assert "Gradient norm, before clipping. one: 1.5 at step 1, 1.5 at step 3." in labels  # step 2 was not finite
    assert "Reward format. one: 1.25 at step 1, 1.25 at step 3." in labels
    assert not [label for label in labels if label.startswith("KL")]  # not in the records


def test_texts_are_shown_and_do_nothing(tmp_path):
    page = report(make_run(tmp_path / "run", exams=(0, 2), text=HOSTILE))
    assert '<script>document.title = "owned"</script>' in page.text and "{{ 7 * 7 }}" in page.text
    assert "\\x1b[31m\\x00\\u202egnp.exe\\x07" in page.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", page.source)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "iframe", "object", "embed", "form", "link", "base"}
    assert [name for _, attributes in page.elements for name in attributes if name.startswith("on")] == []


def test_nothing_is_fetched(tmp_path):
    page = report(make_run(tmp_path / "run", exams=(0,)))
    links = [value for _, attributes in page.elements for name, value in attributes.items() if name in ("href", "src")]
    assert links and all(link.startswith("#") for link in links)
    assert "url(" not in page.source and "@import" not in page.source and "http:" not in page.source
    [policy] = [one["content"] for _, one in page.elements if one.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy
    ids = {one["id"] for _, one in page.elements if one.get("id")}
    assert {link[1:] for link in links} == ids


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_run_that_has_hardly_begun_or_was_killed(tmp_path, steps):
    rundir = make_run(tmp_path / "run", steps=steps)
    with (rundir.metrics / "trainer.jsonl").open("ab") as file:
        file.write(b'{"kind": "step", "st')  # killed while it wrote
    (rundir.path / "FAILED.md").write_text("# trainer failed first <b>\n")
    page = report(rundir)
    assert f"failed after {steps} of 3 steps" in page.text and "trainer failed first <b>" in page.text
    assert ("No step and no evaluation is recorded yet." in page.text) == (steps == 0)


def test_runs_are_compared(tmp_path):
    one = make_run(tmp_path / "one", exams=(0, 3))
    two = make_run(tmp_path / "two", exams=(1, 2), optimizer__learning_rate="3e-5", objective__name="grpo")
    page = report(one, two, out=tmp_path / "both.html")
    text = re.sub(r"\s+", " ", page.text)
    assert not (one.path / "report.html").exists()
    assert "optimizer.learning_rate 1e-06 3e-05" in text and 'objective.name "dapo" "grpo"' in text
    between = text[text.index("From one at step 3 to two at step 2") :]
    assert between.startswith("From one at step 3 to two at step 2 -0.250 [-0.625, +0.000] (paired bootstrap, n=8)")
    assert "0 prompts won, 2 lost" in between and "2 of 2 prompts lost" in between


def test_runs_without_common_prompts_say_so(tmp_path):
    runs = [make_run(tmp_path / name, exams=(0,)) for name in ("one", "two")]
    other = msgspec.structs.replace(evaluated(0), fingerprint="g")
    other.write(runs[1].evals / f"{other.snapshot}.json")
    assert "cannot compare" in report(*runs).text


def test_evaluations_that_were_sampled_differently_are_not_compared(tmp_path):
    runs = [make_run(tmp_path / name, exams=(0,)) for name in ("one", "two")]
    other = msgspec.structs.replace(
        evaluated(0), sampling=Sampling(temperature=1.0, top_p=1.0, samples=1, max_tokens=32)
    )
    other.write(runs[1].evals / f"{other.snapshot}.json")
    text = report(*runs).text
    assert "cannot compare: sampled with temperature 0.0 and 1.0, max_tokens 64 and 32" in text


def test_the_first_evaluation_is_that_before_training_only_at_step_0(tmp_path):
    later = Account("later", 0, History.open(make_run(tmp_path / "later", exams=(2,)).path)).summary()
    assert "held out, before" not in later and "(n=8)" in later["held out, at step 2"]
    begun = Account("begun", 0, History.open(make_run(tmp_path / "begun", exams=(0, 2)).path)).summary()
    assert {"held out, before", "held out, after", "change"} <= set(begun)


def test_settings_tell_two_uses_of_a_function_apart():
    functions = "reward=[{function='gsm8k', weight=%s}, {function='gsm8k', options={extractor='last'}}]"
    one, two = (settings(load(None, [functions % weight])) for weight in (0.5, 0.7))
    assert {key for key in one if one[key] != two[key]} == {"reward.gsm8k.weight"}
    assert one["reward.gsm8k_2.options.extractor"] == '"last"'


def test_steps_without_signal_measure_no_tokens():
    steps = [{"step": 1, "train/tokens": 9.0, "entropy": 0.5}, {"step": 2, "train/tokens": 0.0, "entropy": 0.0}]
    assert measured(steps, "entropy") == measured(steps, "sampling/sampling_logp_difference/mean") == steps[:1]
    assert measured(steps, "reward") == steps


def test_what_is_no_run_is_refused(tmp_path):
    run = str(make_run(tmp_path / "run").path)
    for paths in ([str(tmp_path / "none")], [run, run], [run] * 9):
        with pytest.raises(UserError):
            main(paths)


def test_examples_are_told_apart(tmp_path):
    history = History.open(make_run(tmp_path / "run", steps=3).path)
    first = [seen for seen in history.train if seen.version == 0]
    assert [(why, seen.reward) for why, seen in choose(first)] == [
        ("best", 0.75),
        ("median", 0.5),
        ("worst", 0.0),
        ("newest", 0.25),
    ]
    assert choose([]) == []


def test_few_points_keep_the_extremes():
    points = [(step, 1.0 if step == 777 else -1.0 if step == 5 else 0.0) for step in range(10_000)]
    kept = thin(points)
    assert len(kept) <= MAX_POINTS and {(5, -1.0), (777, 1.0), points[0], points[-1]} <= set(kept)


def test_axes_are_round_and_enclose_the_values():
    assert nice(0.1, 0.9) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    for low, high in ((0, 0), (5, 5), (-3e-7, 2e-6), (12, 13_000), (-1e9, -1.0)):
        ticks = nice(low, high)
        assert ticks[0] <= low and high <= ticks[-1] and 2 <= len(ticks) <= 8
    assert [number(value) for value in (0.66666, 12345, 999.9, -2e-5, 0)] == ["0.667", "12.3k", "1000", "-2e-05", "0"]


def test_control_characters_are_shown():
    assert visible("a\tb\nc\x1b\u2066") == "a\tb\nc\\x1b\\u2066"


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_in_a_browser(tmp_path):
    """No width overflows, nothing is asked of a network, nothing is complained about, hostile text included."""
    long = HOSTILE + "x" * 3000
    runs = [make_run(tmp_path / name, exams=(0, 3), text=long) for name in ("one", "two")]
    report(*runs, out=tmp_path / "page.html")
    with Browser(tmp_path / "home") as browser:
        for width, scheme in ((1280, "light"), (360, "dark"), (360, "light")):
            browser.open(tmp_path / "page.html", width, scheme)
            browser.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            assert browser.evaluate("document.title") == "one, two: vesper report"
            dark = browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
            assert dark == (scheme == "dark")
            requests = [one["params"]["request"]["url"] for one in browser.events if "requestWill" in one["method"]]
            assert requests == [(tmp_path / "page.html").as_uri()]
            assert [
                one
                for one in browser.events
                if one["method"].startswith(("Log.", "Runtime.exceptionT", "Runtime.console"))
            ] == []
