#!/usr/bin/env bash
# Make a virtual environment with the project and its test extra, and run the tests in it.
# VENV names the environment (default .venv); arguments go to pytest, which uses up to 8 CPUs.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}

[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
# torch first and alone: the others would be satisfied with any build of it, this pins one.
"$venv/bin/pip" install -q torch==2.13.0
"$venv/bin/pip" install -q -e '.[test]'
exec "$venv/bin/python" -m pytest --numprocesses auto --maxprocesses 8 "$@"
