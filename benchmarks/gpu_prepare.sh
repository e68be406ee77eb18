#!/usr/bin/env bash
# Packs, on a machine with network access, what gpu.sh needs on a GPU machine without it.
#
#     bash benchmarks/gpu_prepare.sh                                # into .gpu/
#     MODEL=./SmolLM2-135M-Instruct DATA=./data bash benchmarks/gpu_prepare.sh
#
# FOLDER          output folder: wheels/, model.part-*, data.tar.gz (default .gpu)
# PYTHON_VERSION  Python version of the GPU machine (default 3.12)
# PACKAGES        packages to download, in the versions of constraints.txt; default: those that are missing from an
#                 image with torch, transformers, accelerate, peft, pyarrow, pandas and pytest
# MODEL           model directory (or any file), packed as a tar file split into parts of size PART (default 30M);
#                 gpu.sh joins them
# DATA            folder of JSONL files for recipes/real
#
# On the GPU machine, with FOLDER in the checkout:
#
#     PACKED=.gpu bash benchmarks/gpu.sh
set -eu
cd "$(dirname "$0")/.."
FOLDER=${FOLDER:-.gpu}
PYTHON=${PYTHON:-python3}
PYTHON_VERSION=${PYTHON_VERSION:-3.12}
PART=${PART:-30M}
PACKAGES=${PACKAGES:-annotated-types datasets dill jsonschema jsonschema-specifications loky multiprocess py3langid \
pydantic pydantic-core referencing rpds-py ruamel.yaml trl typing-inspection}

mkdir -p "$FOLDER"
rm -rf "$FOLDER/wheels" "$FOLDER"/model.part-* "$FOLDER/data.tar.gz"

platforms=()
for tag in manylinux_2_39 manylinux_2_35 manylinux_2_34 manylinux_2_31 manylinux_2_28 manylinux_2_27 \
    manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${tag}_x86_64")
done
# shellcheck disable=SC2086  # PACKAGES is a list of words
"$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --dest "$FOLDER/wheels" -c constraints.txt \
    --implementation cp --python-version "$PYTHON_VERSION" "${platforms[@]}" $PACKAGES

if [ -n "${MODEL:-}" ]; then
    tar -C "$(dirname "$MODEL")" -cf - "$(basename "$MODEL")" |
        split --bytes "$PART" --numeric-suffixes --suffix-length 3 - "$FOLDER/model.part-"
fi
if [ -n "${DATA:-}" ]; then
    tar -C "$DATA" -czf "$FOLDER/data.tar.gz" .
fi
du -sh "$FOLDER"/* >&2
