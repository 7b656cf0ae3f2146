"""For every test file: what a library wrote into the environment does not reach the next one."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def environment() -> Iterator[None]:
    """vLLM writes LOCAL_WORLD_SIZE, for example, by which ranks that a later test starts find their place."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
