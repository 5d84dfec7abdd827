"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

MODELS = Path(os.environ.get("AWQCONV_MODELS", Path(__file__).parents[2] / "shared" / "models"))


@pytest.fixture
def models() -> Path:
    """A folder of real checkpoints: AWQCONV_MODELS, else ../shared/models."""
    if not MODELS.is_dir():
        pytest.skip("no real checkpoints: set AWQCONV_MODELS")
    return MODELS
