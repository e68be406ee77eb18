#!/bin/sh
# Runs chain.yaml in six to seven minutes on one GPU of the H100 class, including the evaluation of every stage:
#
#   MODEL=HuggingFaceTB/SmolLM2-135M-Instruct RUN=runs/real-short sh recipes/real/short.sh
#
# MODEL is a directory or a hub name. DATA is a folder with the files that prepare.py reads; default: the hub.
# PYTHON is the Python interpreter, MEASURE the options of measure.py. Further arguments override the recipe.
set -eu
HERE=$(dirname "$0")
MODEL=${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
if [ -d "$MODEL" ]; then MODEL=$(cd "$MODEL" && pwd); fi  # paths in a recipe are relative to its folder
RUN=${RUN:-runs/real-short}
PYTHON=${PYTHON:-python3}
MEASURE=${MEASURE:---rows 100 --max-new-tokens 256 --batch-size 300}
if [ -n "${DATA:-}" ]; then
    "$PYTHON" "$HERE/prepare.py" --local "$DATA"
else
    "$PYTHON" "$HERE/prepare.py"
fi
"$PYTHON" -m rpo_trainer run "$HERE/chain.yaml" --run-dir "$RUN" \
    model.name_or_path="$MODEL" \
    eval.data.0.max_rows=150 eval.greedy=false \
    eval.generate='{responses: 1, top_k: 1, max_new_tokens: 192, batch_size: 400}' \
    stages.general-sft.num_train_epochs=1 \
    stages.rpo-math.data.train.0.max_rows=350 \
    stages.rpo-math.data.generate.max_new_tokens=192 \
    stages.rpo-code.data.train.0.max_rows=150 \
    stages.rpo-code.data.generate.max_new_tokens=192 \
    stages.rpo-instructions.data.generate.max_new_tokens=256 \
    "$@"
# shellcheck disable=SC2086  # MEASURE is a list of options
"$PYTHON" "$HERE/measure.py" "$RUN" $MEASURE
