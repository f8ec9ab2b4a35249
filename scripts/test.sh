#!/usr/bin/env bash
# Checks style and types, then runs the tests; creates the virtual environment first if it is missing.
#
#   bash scripts/test.sh [--slow] [--system] [pytest arguments ...]
#
# --slow runs the tests marked slow too. --system runs only the tests marked system, which need SLURM, Chromium or gcc
# (.ci/run installs them). Tests marked gpu skip themselves where there is no CUDA device.
set -euo pipefail
CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")/.."

system="not system"
slow=" and not slow"
arguments=()
for argument in "$@"; do
    case $argument in
        --slow) slow="" ;;
        --system) system="system" ;;
        *) arguments+=("$argument") ;;
    esac
done

source scripts/venv.sh requirements-dev.txt
[[ $system == system ]] || bash scripts/lint.sh

# Two processes of one thread each: tiny tensors gain nothing from more, and many tests wait for processes they start.
# The tests of a file stay in one of them, with its fixtures; files that take long come first (tests/conftest.py).
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python -m pytest -q --durations=15 -n 2 --dist loadfile --no-loadscope-reorder -m "$system$slow" ${arguments[@]+"${arguments[@]}"}
