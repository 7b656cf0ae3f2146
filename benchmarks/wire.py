"""What a rollout costs on its way from sampler to trainer, beside the same bytes without us and others' formats.

    python -m benchmarks.wire                         five minutes on two cores
    python -m benchmarks.wire --only formats          or bytes, or sizes

vesper's way: arrays packed, group encoded, CURVE socket, decoded, checked, booked in the ledger, acknowledged, taken in
steps and committed; a real session, hub, desk, ledger and inbox, and no engine. `link` is the same with the sampler's
asyncio link. raw sends frames of the same bytes over the same kind of sockets, answers each, and looks into none; the
formats of others do so with what their code sends for the same rollouts, with CURVE too. All are interleaved in one
run, each with its clients and server in processes of their own. Rates are by the clock; `CPU` is of all processes.
"""

import argparse
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.child import tidy_when_stopped
from benchmarks.hub_load import Size, make_group
from benchmarks.measure import emit, interleaved, spread, timed
from benchmarks.wire_formats import formats
from protocol import codec

SAME_BYTES = ("vesper", "raw, CURVE", "raw, plain")
OTHERS = ("pickle", "msgpack lists", "JSON lines")
WINDOW = 32
"""Groups of one client that are on their way."""
SIZES = [
    Size(prompt=prompt, length=length, vocabulary=vocabulary, reference=reference)
    for prompt, length in ((120, 256), (400, 2048))
    for vocabulary in (49_152, 151_936)
    for reference in (False, True)
]


def measured(size: Size, clients: int, names: Sequence[str], options: argparse.Namespace) -> list[dict[str, object]]:
    """One row for each way, all of them in turns."""
    from benchmarks.wire_turn import once  # torch, only now

    groups = whole_steps(options.groups * 256 // max(256, size.length // 2), options.per_step)
    found: dict[str, list[dict]] = {name: [] for name in names}

    def run(name: str) -> float:
        found[name].append(once(name, size, clients, groups, WINDOW, options.per_step))
        return found[name][-1]["rate"]

    rates = interleaved({name: functools.partial(run, name) for name in names}, options.rounds)
    raw = [np.array(rates["raw, CURVE"]), per_group(found["raw, CURVE"], "busiest")]
    facts = {"prompt": size.prompt, "length": size.length, "ids": 8 * size.id_bytes, "ref": size.reference}
    return [
        facts | {"clients": clients, "way": name} | row(size, found[name], *raw)
        | latency(once(name, size, clients, whole_steps(groups // 8, options.per_step), 1, options.per_step))
        for name in names
    ]  # fmt: skip


def whole_steps(groups: int, per_step: int) -> int:
    return max(1, groups // per_step) * per_step


def per_group(found: Sequence[Mapping], name: str) -> np.ndarray:
    """CPU seconds, of each round."""
    return np.array([one[name] / one["trained"] for one in found])


def row(size: Size, found: Sequence[Mapping], raw_rates: np.ndarray, raw_busiest: np.ndarray) -> dict[str, object]:
    """of raw: rates by the clock, of the same round. of raw by CPU: the busiest thread's work a group, as if each
    thread had a core for itself. Medians; min and max belong to the column before them."""
    ratios = spread(np.array([one["rate"] for one in found]) / raw_rates)
    everything, busiest = per_group(found, "cpu"), per_group(found, "busiest")
    cpu, busy = spread(everything * 1e6), spread(busiest * 1e6)
    rate, last = spread([one["rate"] for one in found])["median"], found[-1]
    return {
        "rollouts/s": round(size.completions * rate), "of raw": round(ratios["median"], 2),
        "min": round(ratios["min"], 2), "max": round(ratios["max"], 2),
        "CPU us/group": round(cpu["median"]), "CPU min": round(cpu["min"]), "CPU max": round(cpu["max"]),
        "busiest us": round(busy["median"]), "busiest min": round(busy["min"]), "busiest max": round(busy["max"]),
        "of raw by CPU": round(float(np.median(raw_busiest / busiest)), 2),
        "CPU s/1e6 tokens": round(cpu["median"] / size.tokens, 3),
        **{name: last[name] for name in ("sent", "received", "trained", "dropped")},
    }  # fmt: skip


def latency(found: Mapping) -> dict[str, float]:
    """One way, one group at a time."""
    return {f"p{part} ms": round(float(np.quantile(found["late"], part / 100)) * 1e3, 2) for part in (50, 99)}


def weight(size: Size) -> list[dict[str, object]]:
    """Bytes of each form beside those of the arrays alone, and copying vesper's in memory."""
    block = codec.encode(make_group(size))
    copy = min(timed(lambda: bytearray(block)) for _ in range(1000))
    return [
        {"prompt": size.prompt, "length": size.length, "ids": 8 * size.id_bytes, "ref": size.reference,
         "way": "vesper" if name == "raw, CURVE" else name, "bytes/rollout": len(data) // size.completions,
         "bytes/token": round(len(data) / size.tokens, 2), "floor": round(size.floor, 2),
         "memcpy us/group": round(copy * 1e6, 1)}
        for name, form in formats(size).items() if name != "raw, plain"
        for data in [form.encode()]
    ]  # fmt: skip


def main() -> None:
    flags = argparse.ArgumentParser(prog="benchmarks.wire", description=__doc__.splitlines()[0])
    flags.add_argument("--only", choices=("bytes", "sizes", "formats"), help="one of the tables")
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--groups", type=int, default=2048, help="of 8 x 256 a measurement; fewer of longer ones")
    flags.add_argument("--per-step", type=int, default=64, help="groups of a step")
    flags.add_argument("--clients", type=int, nargs="+", default=[1, 2])
    options = flags.parse_args()
    tidy_when_stopped()
    parts = [options.only] if options.only else ["bytes", "sizes", "formats"]
    facts = {"rounds": options.rounds, "groups": options.groups, "per_step": options.per_step, "window": WINDOW}
    if "bytes" in parts:
        emit("wire: bytes", [one for size in SIZES for one in weight(size)], completions=Size().completions)
    if "sizes" in parts:
        loads = [(size, clients) for size in SIZES for clients in options.clients]
        rows = [one for load in loads for one in measured(*load, SAME_BYTES, options)]
        emit("wire", rows, **facts)
    if "formats" in parts:
        sizes = [size for size in SIZES if size.reference and size.vocabulary > 1 << 16]
        rows = [one for size in sizes for one in measured(size, 1, [*SAME_BYTES, "vesper, link", *OTHERS], options)]
        emit("wire: formats", rows, **facts)


if __name__ == "__main__":
    main()
