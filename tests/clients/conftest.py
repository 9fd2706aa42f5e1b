import numpy as np
import pytest


@pytest.fixture
def run():
    """A run of its own for each test: what its clients keep lies in a folder of this name."""
    return np.random.default_rng().bytes(8).hex()
