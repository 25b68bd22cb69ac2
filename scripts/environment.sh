# Sourced by demo.sh and test.sh: makes (or reuses) the virtual environment .venv in the repository root and installs
# sda-fast into it. SDA_FAST_PYTHON chooses the interpreter, SDA_FAST_VENV the folder, SDA_FAST_TORCH the torch to install.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv="${SDA_FAST_VENV:-.venv}"
torch="${SDA_FAST_TORCH:-torch==2.13.0}"

say() { printf '\n== %s\n' "$*"; }

find_python() {
    local candidate
    for candidate in "${SDA_FAST_PYTHON:-}" python3 python python3.13 python3.12 python3.11; do
        if [ -n "$candidate" ] && command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            echo "$candidate"
            return
        fi
    done
    echo "sda-fast needs Python 3.11 or later; none was found. Set SDA_FAST_PYTHON to one." >&2
    return 1
}

install_with() { # install_with EXTRA: installs sda-fast, editable, with the named extra ("" for none)
    if [ ! -x "$venv/bin/python" ]; then
        local python
        python="$(find_python)"
        say "Making a virtual environment in $venv with $("$python" --version)"
        "$python" -m venv "$venv"
    fi
    local stamp="$venv/.sda-fast-installed-${1:-base}"
    local wanted
    wanted="$(cat pyproject.toml setup.py csrc/host/*.*; echo "$torch")"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
            say "Installing $torch"
            "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$torch"
        fi
        say "Installing sda-fast and what it needs${1:+ (with the extra \"$1\")}"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e ".${1:+[$1]}"
        printf '%s' "$wanted" >"$stamp"
    else
        say "Using the virtual environment in $venv"
    fi
}
