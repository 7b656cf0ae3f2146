"""For every test file: what a library wrote into the environment does not reach the next one, and Ctrl-C is heard."""

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# A shell that starts the suite in the background has it ignored, and all that tests start inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)
# A busy machine may stand still for longer than an example may take by default.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(autouse=True, scope="module")
def environment() -> Iterator[None]:
    """vLLM writes LOCAL_WORLD_SIZE, for example, by which ranks that a later test starts find their place."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
