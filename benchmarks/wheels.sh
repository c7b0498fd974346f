#!/usr/bin/env bash
# Wheels for a GPU machine without a network, which has Python 3.12 (x86-64), PyTorch >= 2.11 with CUDA, transformers and
# what these pull in: all else that `python -m benchmarks.gpu` needs, its tests and open_clip too.
#   benchmarks/wheels.sh [FOLDER]      .whl when none is given; from the root of a checkout with .venv made
# There: python3 -m pip install --no-index --no-deps --target FOLDER/site FOLDER/*.whl
#        PYTHONPATH=FOLDER/site python3 -m benchmarks.gpu
# Versions are those of requirements.txt; packages that it has not are named with theirs here.
set -euo pipefail
folder=${1:-.whl}
python=.venv/bin/python
mkdir -p "$folder"
platforms=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
for glibc in 39 35 34 31 28 27 24 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done

pinned() {
  grep -E "^$1==" requirements.txt || { echo "$1 is not in requirements.txt" >&2; exit 1; }
}

wanted=(open_clip_torch==3.3.0 ftfy==6.3.1 wcwidth==0.2.14)
for name in pydantic pydantic-core annotated-types typing-inspection typing-extensions pyyaml fsspec tqdm ijson regex \
  psutil hjson py-cpuinfo msgpack ninja einops pytest pytest-timeout pytest-xdist execnet pluggy iniconfig pygments packaging; do
  wanted+=("$(pinned "$name")")
done
for package in "${wanted[@]}"; do
  $python -m pip download -qq --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
    -d "$folder" "$package"
done
# it has no wheel of its own; without CUDA here its kernels are left out, which ZeRO does not need
DS_BUILD_OPS=0 $python -m pip wheel -qq --no-deps --no-build-isolation -w "$folder" "$(pinned deepspeed)"
du -sh "$folder"
