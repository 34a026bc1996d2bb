"""Claims to the last bit, and exact solutions, in the programs that users get: with the compiler's own settings.

The other tests are compiled for speed of compilation, with other loops and other rounding.
"""

import os
import pathlib
import subprocess
import sys

import pytest

TESTS = pathlib.Path(__file__).parents[1]
CLAIMS = {
    "exact solutions": ("systems/test_exact.py", ""),
    "resumed sweeps, and members against single runs": ("sweeps/test_sweep.py", "same_bits or equals_a_single_run"),
    "resumed paths, and paths against single runs": ("sweeps/test_sweep_paths.py", "same_bits or equals_a_single_run"),
    "members among others that fail": ("sweeps/test_sweep_machines.py", "change_no_bit"),
    "padding": ("sweeps/test_sweep_padding.py", "equal_unpadded or rules_are_padded"),
    "resumed runs, killed ones among them": ("stores/test_run_store.py", "same_bits"),
    "segments against one run, batches against a loop": ("runs/test_solve.py", "same_numbers or equals_a_loop"),
}


@pytest.mark.slow
@pytest.mark.parametrize("claim", CLAIMS)
def test_under_the_settings_that_users_have(claim):
    file, chosen = CLAIMS[claim]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-m", "", "-k", chosen, str(TESTS / file)]
    done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
