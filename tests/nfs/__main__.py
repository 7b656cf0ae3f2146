"""python -m tests.nfs --faults 30 --seed 1     one run on two machines whose shared disk has bad days; a JSON line"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.nfs.mount import why_not

HABITS = {"acregmin": 0.1, "acregmax": 1.0, "acdirmin": 0.5, "acdirmax": 2.0, "writeback": 0.5}


def main() -> int:
    flags = argparse.ArgumentParser("nfs", description="A run on two machines whose shared disk has bad days.")
    flags.add_argument("--faults", type=int, default=20)
    flags.add_argument("--seed", type=int, default=1)
    flags.add_argument("--ranks", type=int, default=1, help="those after the first are on the samplers' machine")
    flags.add_argument("--steps", type=int, default=60)
    flags.add_argument("--away", type=float, default=30.0, help="seconds for which the server is away, once")
    flags.add_argument("--keep", action="store_true", help="keep the directory of a run that went well, too")
    options = flags.parse_args()
    if why_not():
        print(why_not())
        return 2
    import sampler.replica  # noqa: F401
    import trainer.rank  # noqa: F401  both once, here: every process is forked from this one
    from tests.chaos.cluster import Violation
    from tests.nfs.machines import BadDisk, machines

    place, began = Path(tempfile.mkdtemp(prefix="nfs-")), time.monotonic()
    try:
        shape = {"steps": options.steps, "ranks": options.ranks, "samplers": 2, "trainer.max_staleness": 2}
        with machines(place, HABITS, seed=options.seed, **shape) as cluster:
            disk = BadDisk(cluster, options.seed, options.faults, options.away)
            cluster.run(disk)
            found = cluster.audit() | {"left": cluster.leftovers(), "steps": cluster.steps()}
    except Violation as violation:
        print(f"VIOLATION: {violation}; kept: {place}")
        return 1
    found |= {"faults": dict(disk.counts), "exits": [list(one) for one in cluster.exits]}
    print(json.dumps(found | {"seconds": round(time.monotonic() - began, 1)}))
    bad = bool(found["lost"] or found["doubled"] or found["left"])
    if bad or options.keep:
        print(f"kept: {place}")
    else:
        shutil.rmtree(place)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
