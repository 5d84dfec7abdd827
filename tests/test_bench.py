"""What `bench` returns: its table, JSON and plot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from awqconv.bench import BenchResult, Row
from awqconv.errors import AwqconvError

RESULT = BenchResult(
    "model",
    "2 CPU cores",
    1e9,
    (
        Row("marlin", 256, 128, 128, 4, 20_000, 1e9, {1: 1e-5, 16: 2e-5}),
        Row("awq", 256, 128, 128, 4, 20_000, 2e9, {1: 2e-5, 16: 3e-5}),
    ),
)


def test_table_and_json() -> None:
    heads, rows = RESULT.table()
    assert heads[-2:] == ["M 1 us", "M 16 us"]
    assert rows[0] == ["marlin", "256 x 128", "128", "4", "1.00", "10.0", "20.0"]
    assert json.loads(json.dumps(RESULT.to_dict()))["rows"][1]["target"] == "awq"


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    RESULT.plot(tmp_path / f"roofline.{suffix}")
    assert (tmp_path / f"roofline.{suffix}").stat().st_size > 1000


def test_plot_needs_a_known_suffix(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(AwqconvError, match=r"\.png or \.svg"):
        RESULT.plot(tmp_path / "roofline.pdf")
