#!/usr/bin/env bash
# Sets everything up in a virtual environment of its own and runs the whole demo; arguments go to `sda-fast demo`.
source "$(dirname "$0")/environment.sh"
install_with ""
say "Running the demo (generated catalogue, small model, CPU is enough)"
exec "$venv/bin/sda-fast" demo "$@"
