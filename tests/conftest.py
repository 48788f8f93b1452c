"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

# The same examples in every run, however slow the machine is. `--hypothesis-profile=default` looks for new ones.
hypothesis.settings.register_profile(
    "suite", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("suite")

# Small tests on few cores: one thread each is faster than two that wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "2")

ROOT = Path(__file__).resolve().parent.parent


def find_data() -> Path | None:
    """The folder of real recordings: $DSPFUSION_DATA, else ../shared/data beside the checkout."""
    candidate = Path(os.environ.get("DSPFUSION_DATA") or ROOT.parent / "shared" / "data")
    return candidate if (candidate / "eval" / "index.csv").is_file() else None


@pytest.fixture(scope="session")
def data_dir() -> Path:
    found = find_data()
    if found is None:
        pytest.skip("no real recordings here: set DSPFUSION_DATA to their folder")
    return found


@pytest.fixture(autouse=True, scope="session")
def _own_engine_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests neither use nor fill the user's engine cache."""
    os.environ["DSPFUSION_CACHE"] = str(tmp_path_factory.mktemp("cache"))
