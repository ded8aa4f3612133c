from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.report import median_and_spread, write_report


def test_median_and_spread() -> None:
    assert median_and_spread([3.0, 1.0, 2.0]) == (2.0, [1.0, 1.5, 2.5, 3.0])
    assert median_and_spread([4.0]) == (4.0, [4.0] * 4)
    with pytest.raises(ValueError, match="no samples"):
        median_and_spread([])


def test_report_says_how_to_measure_again(tmp_path: Path) -> None:
    path = tmp_path / "results" / "x.json"
    write_report(
        path,
        {"ratio": 0.5},
        {"ratio": [0.4, 0.6]},
        seed=3,
        extra={"rounds": 2, "seed": "not this one", "model": f"{Path.home()}/m"},
    )
    assert json.loads(path.read_text())["model"] == "~/m"
    report = json.loads(path.read_text())
    assert report["figures"] == {"ratio": 0.5}
    assert report["seed"] == 3
    assert report["rounds"] == 2
    assert report["machine"]["cores"] >= 1
    assert "torch" in report["versions"]
    assert report["command"]
