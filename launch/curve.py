"""The learning curve as a PNG: accuracy on the training prompts step by step, and held out with its intervals."""

from pathlib import Path

from protocol.metrics import read_metrics
from protocol.recipe import Recipe
from protocol.rundir import RunDir


def draw_curve(rundir: RunDir, recipe: Recipe) -> Path:
    """Writes and returns curve.png in the run directory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_metrics(rundir.metrics / "trainer.jsonl")
    steps = [record for record in records if record["kind"] == "step"]
    exams = [record for record in records if record["kind"] == "exam"]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    numbers = [record["step"] for record in steps]
    accuracy = [record["accuracy"] for record in steps]
    smooth = [sum(part) / len(part) for part in (accuracy[max(0, end - 5) : end] for end in range(1, len(steps) + 1))]
    axes.plot(numbers, accuracy, ".", color="tab:blue", alpha=0.35, label="training prompts, one step")
    axes.plot(numbers, smooth, color="tab:blue", label="mean of 5 steps")
    if exams:
        middle = [record["accuracy"] for record in exams]
        below = [record["accuracy"] - record["low"] for record in exams]
        above = [record["high"] - record["accuracy"] for record in exams]
        at = [record["step"] for record in exams]
        axes.errorbar(at, middle, [below, above], fmt="o", color="tab:red", capsize=4, label="held out, 95 % interval")
    axes.set(xlabel="optimizer step", ylabel="accuracy", ylim=(0, 1), title=f"{recipe.name}: {recipe.model.path}")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    path = rundir.path / "curve.png"
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
