"""Bad histories of a run, thousands of them, in virtual time: the real Desk, Ledger and Session, and nothing else real.

One seed is one history: a plan is drawn (how many samplers, how bad a network, which faults), then one heap of events
is worked off until the run is complete. The trainer process, the sampler processes, the disk and the network between
them are made up, after trainer/inbox.py, trainer/loop.py, trainer/store.py and sampler/link.py. No wall clock, no
thread, no socket: a seed always tells the same story.

The audit is the model: training group g adds 1 to weight g, and a checkpoint keeps weights and ledger together. In
the end each trained group must weigh exactly 1, whatever has happened.

    python -m tests.simulation --seeds 1000              a table; exit 1 and the seed at the first violation
    python -m tests.simulation --seed 17 --verbose       that history, line by line
"""
