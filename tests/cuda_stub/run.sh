#!/usr/bin/env bash
# Runs a command on the pretend GPU: run.sh STUB_DIR COMMAND ... (STUB_DIR: the folder that build.sh made).
# STUB_CC=9.0 (capability), STUB_MEM_GB=80, STUB_NDEV=1, STUB_NCCL_LOG=<prefix> (collectives of each rank, one a line).
set -euo pipefail
stub=$(cd "$1" && pwd) here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
shift
export LD_LIBRARY_PATH="$stub${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" TRITON_LIBCUDA_PATH="$stub"
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
LD_PRELOAD="$stub/libcudart_stub.so" exec "$@"
