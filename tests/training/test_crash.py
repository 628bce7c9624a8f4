"""Law 7 under SIGKILL: a run that is killed and started again ends like one never stopped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_runs_killed_at_random_points_end_like_the_whole_run_bit_for_bit() -> None:
    options = ["--points", "4", "--seed", "7", "--ranks", "1", "2"]
    path = os.pathsep.join([str(ROOT / "src"), *sys.path])
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "crash.py"), *options],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count('"differs": []') == 8
    for kind in ("plain 0", "plain 2", "features 0", "targets 0"):
        for ranks in (1, 2):
            assert f'"ranks": {ranks}, "run": "{kind}"' in done.stdout
