"""Real processes under a nemesis: the two workers with everything but the model, and the model is the audit.

    python -m tests.chaos --faults 1000

The toy model is a vector with one weight per prompt group; training group g adds 1 to weight g. At the end of a run
the published weights must be 1 for every trained group and 0 for every other: they cannot lie, they are the model.
Hub, session, ledger, snapshots, checkpoints, gloo ranks, reward processes, signals, exit codes: all real.
"""
