#!/bin/sh
# tests/gpu without a GPU, over torch's CUDA build: sh tests/soft_gpu/run.sh PYTHON [pytest's arguments]
# PYTHON: of an environment with it (pip install torch==2.11.0 triton==3.6.0 numpy safetensors pytest pytest-timeout
# pydantic pyyaml), and gcc with CUDA's headers (CUDA_INCLUDE). Kernels of Triton's and graphs do nothing, so tests that
# compare what comes of these fail: by default they are left out.
set -eu
python=$1
shift
here=$(cd "$(dirname "$0")" && pwd)
made=$(mktemp -d)
clean() { # "memory of the GPU" that dead processes left
    rm -rf "$made"
    for left in /dev/shm/stand-in-cuda-*; do
        owner=${left#/dev/shm/stand-in-cuda-}
        [ -e "$left" ] && ! kill -0 "${owner%%-*}" 2>/dev/null && rm -f "$left"
    done
    return 0
}
trap clean EXIT
gcc -O1 -w -shared -fPIC -I"${CUDA_INCLUDE:-/usr/local/cuda/include}" -o "$made/runtime.so" "$here/runtime.c" -lpthread -ldl
gcc -O1 -w -shared -fPIC -o "$made/libcuda.so.1" "$here/driver.c" -lrt
cd "$here/../.."
[ $# -gt 0 ] || set -- tests/gpu -k "not by_the_kernel and not rows_are_those_of_torch and not those_of_the_model"
LD_LIBRARY_PATH=$made LD_PRELOAD=$made/runtime.so PYTHONPATH=$here:$PWD${PYTHONPATH:+:$PYTHONPATH} \
    "$python" -m pytest -q -p softgpu -p no:cacheprovider "$@"
