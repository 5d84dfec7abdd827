"""A short run of benchmarks/faults.py: a conversion dies or fails at any moment and goes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).parents[1] / "benchmarks" / "faults.py"


@pytest.mark.parametrize(
    ("kinds", "runs"),
    [
        (("order", "twice"), 4),
        (("boundary",), 8),
        (("power",), 6),
        (("random",), 6),
        (("error", "read"), 6),
        (("source",), 3),
        (("space",), 2),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else str(value),
)
def test_every_fault_leaves_nothing_unfinished_and_the_same_command_goes_on(kinds, runs):
    command = [sys.executable, HARNESS, "--json", "--runs", str(runs), "--only", *kinds]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    figures = json.loads(done.stdout)
    assert not figures["failures"]
    skipped = [line for line in done.stderr.splitlines() if line.startswith("skipped: ")]
    assert figures["faults"] or skipped
    if skipped and kinds == ("space",):
        pytest.skip("; ".join(skipped))
