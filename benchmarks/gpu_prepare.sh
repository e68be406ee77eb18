#!/usr/bin/env bash
# Prepares, on a machine with a network, what gpu.sh needs on a GPU machine without one.
#
#     bash benchmarks/gpu_prepare.sh                                # into .gpu/
#     MODEL=./SmolLM2-135M-Instruct DATA=./data bash benchmarks/gpu_prepare.sh
#
# FOLDER          where it goes: wheels/, model.part-*, data.tar.gz (default .gpu)
# PYTHON_VERSION  of the GPU machine (default 3.12)
# PACKAGES        wheels to take, in the versions of constraints.txt; the default is what an image with torch,
#                 transformers, accelerate, peft, pyarrow, pandas and pytest lacks
# MODEL           a model folder (or any file), packed as a tar in parts of PART (default 30M), so that each
#                 can travel alone; gpu.sh joins them
# DATA            a folder of JSONL files for recipes/real
#
# On the GPU machine, with FOLDER beside the checkout:
#
#     PACKED=.gpu bash benchmarks/gpu.sh
set -eu
cd "$(dirname "$0")/.."
FOLDER=${FOLDER:-.gpu}
PYTHON=${PYTHON:-python3}
PYTHON_VERSION=${PYTHON_VERSION:-3.12}
PART=${PART:-30M}
PACKAGES=${PACKAGES:-annotated-types datasets dill jsonschema jsonschema-specifications multiprocess py3langid \
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
