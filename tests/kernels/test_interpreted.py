"""The Triton kernels equal the reference bit for bit, under Triton's interpreter, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
FILES = [
    str(HERE / name)
    for name in ("interpreted.py", "interpreted_fused.py", "interpreted_norms.py", "interpreted_zero.py")
]


def test_the_kernels_equal_the_reference():
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *FILES]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    ran = subprocess.run(
        command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
