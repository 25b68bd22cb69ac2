"""Takes each barrier and each wait out of the CUDA sources alone and runs the emulated kernels' tests.

    python tests/csrc/without_barriers.py [SOURCE ...]

Prints one line for each; ends with status 1 if there is one without which every test passes. Takes some minutes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
STATEMENT = re.compile(r"__syncthreads\(\);|sync_warp\(\);|wait_for_copies<\d>\(\);")
# Of each source the tests that run its kernels.
TESTS = {
    "decode.cu": ("test_csrc_decode_fuzz.py", "cuda_decode"),
    "decode_fold.cu": ("test_csrc_arithmetic.py", "fold"),
    "linear.cu": ("test_csrc_arithmetic.py", "linear or parts"),
    "gates.cu": ("test_csrc_gates.py", "gates"),
    "passes_forward.cu": ("test_csrc_passes.py", "project or expand or dropout"),
    "passes_backward.cu": ("test_csrc_passes.py", "dy_pass or dx_pass or rows"),
}


def fault_without(source: str, text: str) -> str | None:
    """What the first failing test says where `text` stands for a source; None if all pass."""
    file, names = TESTS[source]
    with tempfile.TemporaryDirectory() as folder:
        changed = Path(folder, source)
        changed.write_text(text)
        command = [sys.executable, "-m", "pytest", "-qx", "--no-header", str(HERE / file), "-k", names]
        environment = {**os.environ, "SDA_FAST_EMULATE_INSTEAD": str(changed)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode == 0:
        return None
    found = re.search(r"^E +AssertionError: (.*)$", done.stdout, re.MULTILINE)
    if done.returncode != 1 or found is None:
        raise RuntimeError(done.stdout + done.stderr)
    return found[1]


def main() -> None:
    unseen = 0
    for source in sys.argv[1:] or TESTS:
        text = (CSRC / source).read_text()
        for statement in STATEMENT.finditer(text):
            fault = fault_without(source, text[: statement.start()] + ";" + text[statement.end() :])
            unseen += fault is None
            line = text.count("\n", 0, statement.start()) + 1
            print(f"{source}:{line}: {statement[0]} {fault or 'NO TEST FAILS'}", flush=True)
    sys.exit(unseen > 0)


if __name__ == "__main__":
    main()
