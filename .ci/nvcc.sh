#!/bin/sh
# Puts nvcc 13.0 in a folder, from PyPI wheels; needs no GPU, no driver and no CUDA installation.
#
#   .ci/nvcc.sh FOLDER && . FOLDER/env.sh && cargo build --release --features cuda
#
# About 105 MB are downloaded once; a folder that already holds this version is left alone.
set -eu
if [ $# -ne 1 ]; then
    echo "usage: .ci/nvcc.sh FOLDER" >&2
    exit 2
fi
mkdir -p "$1"
folder=$(cd "$1" && pwd)
home=$folder/nvidia/cu13
version=13.0.88

if ! "$home/bin/nvcc" --version 2>/dev/null | grep -q "V$version"; then
    # One pip call for all wheels: a second call would replace the folder they share.
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore \
        --no-deps --no-compile --upgrade --target "$folder" \
        nvidia-cuda-nvcc==$version nvidia-nvvm==$version nvidia-cuda-crt==$version \
        nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
    # The wheels say lib, nvcc looks in lib64.
    ln -sfn lib "$home/lib64"
fi
cat > "$folder/env.sh" <<END
export CUDA_HOME=$home
export PATH=$home/bin:\$PATH
END
"$home/bin/nvcc" --version | tail -n 2
echo "now: . $folder/env.sh"
