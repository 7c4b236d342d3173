#!/bin/sh
# Makes .venv and installs plexrank with its tools; says what to do where it cannot. A second run changes nothing.
#   PYTHON=python3.12   the interpreter to use (default: the first of python3, python3.13, 3.12, 3.11 that is new enough)
#   GPU=1               the CUDA build of fbgemm-gpu in place of the stand-in that brings the CPU build
#   TORCH_INDEX=URL     one more package index for torch, such as PyTorch's own index of CPU builds
set -eu
cd "$(dirname "$0")/.."

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        new_enough "$PYTHON" && echo "$PYTHON" && return
        echo "plexrank needs Python 3.11 or newer; PYTHON=$PYTHON is not" >&2
        return 1
    fi
    for candidate in python3 python3.13 python3.12 python3.11; do
        new_enough "$candidate" && echo "$candidate" && return
    done
    echo "plexrank needs Python 3.11 or newer, and found none. Install one, for example:" >&2
    echo "    sudo apt-get install python3.11 python3.11-venv && make PYTHON=python3.11" >&2
    return 1
}

make_venv() {
    "$1" -m venv .venv >/dev/null 2>&1 && return
    "$1" -m virtualenv -q .venv 2>/dev/null && return
    # Debian keeps ensurepip in a package of its own; any pip can fill an environment that has none.
    if "$1" -m pip --version >/dev/null 2>&1; then
        rm -rf .venv
        "$1" -m venv --without-pip .venv && "$1" -m pip --python .venv/bin/python install -q pip && return
    fi
    version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "python$version-venv is missing: installing it" >&2
        { apt-get update -qq && apt-get install -y -qq "python$version-venv"; } >/dev/null &&
            rm -rf .venv && "$1" -m venv .venv && return
    fi
    rm -rf .venv
    echo "This Python cannot make environments. Run this, then the same make command again:" >&2
    echo "    sudo apt-get install python$version-venv" >&2
    return 1
}

if [ -n "${GPU:-}" ]; then
    set -- -e '.[dev,gpu]'
else
    set -- ./packaging/fbgemm-gpu -e '.[dev]'
fi
[ -n "${TORCH_INDEX:-}" ] && set -- --extra-index-url "$TORCH_INDEX" "$@"

stamp=.venv/.installed
state=$({ cat pyproject.toml requirements.lock packaging/fbgemm-gpu/pyproject.toml; echo "$*"; pwd; } | cksum)
if [ -x .venv/bin/plexrank ] && [ "$(cat "$stamp" 2>/dev/null)" = "$state" ]; then
    touch "$stamp"
    exit 0
fi

if ! [ -x .venv/bin/python ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    make_venv "$(find_python)"
fi
echo "installing into .venv (the first time takes some minutes)" >&2
.venv/bin/python -m pip install -q --disable-pip-version-check -c requirements.lock "$@"
.venv/bin/python -m pip check --disable-pip-version-check >&2
echo "$state" >"$stamp"
