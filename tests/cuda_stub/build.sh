#!/usr/bin/env bash
# Builds the pretend GPU: build.sh PYTHON OUT_DIR. PYTHON has a CUDA build of torch, whose nvidia-* and triton wheels
# bring the headers. Functions of the libraries that the C files do not define become ones that return 0.
set -euo pipefail
python=$1 out=$2 here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
site=$("$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])')
mkdir -p "$out"

headers=$site/triton/backends/nvidia/include

returning_0() { sed -E 's/.*/__attribute__((weak)) int &(void) { return 0; }/' | sort -u; } # reads names
nm -D --undefined-only "$site"/torch/lib/*.so "$site"/nvidia/*/lib/*.so* "$site"/xformers/*.so 2>/dev/null |
    grep -oE '\b(cuda|cublas|cublasLt|nccl)[A-Z]\w*' | returning_0 >"$out/other_runtime.c"
grep -oE '\bcu[A-Z]\w*\(' "$headers/cuda.h" | tr -d '(' | returning_0 >"$out/other_driver.c"

gcc -O1 -shared -fPIC -w -I"$headers" -I"$site/nvidia/cuda_runtime/include" \
    -o "$out/libcudart_stub.so" "$here"/{runtime,cublas,nccl}.c "$out/other_runtime.c" -lpthread
gcc -O1 -shared -fPIC -w -Wl,-soname,libcuda.so.1 -o "$out/libcuda.so.1" "$here/driver.c" "$out/other_driver.c"
ln -sf libcuda.so.1 "$out/libcuda.so"
