#!/usr/bin/env bash
# Sets everything up in a virtual environment of its own and runs the checks and the tests; arguments go to pytest.
source "$(dirname "$0")/environment.sh"
install_with dev
say "Checking style and types"
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/mypy" sda_fast
say "Running the tests"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$venv/bin/python" -m pytest --numprocesses auto --dist loadfile "$@"
