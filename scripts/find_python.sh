#!/bin/sh
# Prints a Python 3.11 or 3.12 that really runs and can make virtual environments (version managers leave names that
# fail), or says what to install.
for python in "${PYTHON:-}" python3.11 python3.12 python3 python \
    "$HOME"/.pyenv/versions/3.11.*/bin/python3 "$HOME"/.pyenv/versions/3.12.*/bin/python3; do
    [ -n "$python" ] || continue
    "$python" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null &&
        "$python" -c 'import sys; print(sys.executable)' && exit 0
done
echo "error: no Python 3.11 or 3.12 with venv was found; install one (Debian, Ubuntu: apt install python3.11-venv;" \
    "macOS: brew install python@3.11; anywhere: pyenv install 3.11), or name it: make PYTHON=/path/to/python3.11" >&2
exit 1
