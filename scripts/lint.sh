#!/usr/bin/env bash
# Checks style and types: ruff check, ruff format, mypy. Changes nothing; `ruff format .` and `ruff check --fix .` do.
set -euo pipefail
CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh requirements-dev.txt

python -m ruff check .
python -m ruff format --check .
python -m mypy
