"""bench/soak.py for some seconds: clients that come and go, on a tiny model, dense and sparse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SPARSE

SOAK = Path(__file__).resolve().parent.parent / "bench" / "soak.py"


@pytest.mark.parametrize("attention", ["full", SPARSE])
def test_everybody_gets_an_answer_and_nothing_stays_in_use(folder: Path, attention: str) -> None:
    command = [sys.executable, str(SOAK), str(folder), "--seconds", "4", "--clients", "24", "--attention", attention, "--threads", "1"]
    command += ["--max-tokens", "40", "--words", "100", "--patience", "2", "--max-queue", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (done.stdout[-1000:], done.stderr[-3000:])
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["wrong"] == 0 and said["whole"] > 5 and said["left after some pieces"] > 0
    assert set(said["in_use"].values()) == {0}
