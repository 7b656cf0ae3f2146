"""What can go wrong, and the exit code that says which.

UserError (2)          a mistake in a recipe, a flag or a file; one line, no traceback
  Rejected (3)         the trainer refused this sampler: another run, model, tokenizer or version
TrainerGone (66)       no trainer answered for `network.grace_s`
PortBusy (69)          another process listens on the port
CrashLoop (70)         a worker crashed too often in a short time; `launch` gives up
EngineDead (71)        vLLM died; start the sampler again
WrongWeights (72)      a snapshot loaded, but the engine does not compute what the trainer computed
StorageError (73)      a file could not be written or verified
NoCheckpoint (74)      checkpoints exist, none is intact
Superseded (75)        a newer trainer took over this run
Diverged (76)          weights or gradients are not finite
OutOfMemory (77)       a GPU or the machine has too little memory for these settings

130 is Ctrl-C, 128 + n a process that signal n ended; 1 is a bug, with its traceback.
"""


class RunError(Exception):
    """An expected way to fail: shown as one line; the process ends with `exit_code`."""

    exit_code = 1


class UserError(RunError):
    exit_code = 2


class Rejected(UserError):
    exit_code = 3


class TrainerGone(RunError):
    exit_code = 66


class PortBusy(RunError):
    exit_code = 69


class CrashLoop(RunError):
    exit_code = 70


class EngineDead(RunError):
    exit_code = 71


class WrongWeights(RunError):
    exit_code = 72


class StorageError(RunError):
    exit_code = 73


class NoCheckpoint(RunError):
    exit_code = 74


class Superseded(RunError):
    exit_code = 75


class Diverged(RunError):
    exit_code = 76


class OutOfMemory(RunError):
    exit_code = 77
