#!/bin/sh
# Runs chain.yaml in six to seven minutes on one GPU of the H100 class, including all evaluations:
#
#   MODEL=HuggingFaceTB/SmolLM2-135M-Instruct RUN=runs/real-short sh recipes/real/short.sh
#
# MODEL is a directory or a hub name. DATA is a folder with the files that prepare.py reads; default: the hub.
# PYTHON is the Python interpreter. Further arguments override the recipe. MEASURE has the options of measure.py, which
# evaluates the tasks at the end; the run itself evaluates only log-probs. `MEASURE=none` omits it.
set -eu
HERE=$(dirname "$0")
MODEL=${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
if [ -d "$MODEL" ]; then MODEL=$(cd "$MODEL" && pwd); fi  # paths in a recipe are relative to its folder
RUN=${RUN:-runs/real-short}
PYTHON=${PYTHON:-python3}
MEASURE=${MEASURE:---rows 400 --batch-size 1000 --stages model,general-sft,dpo,rpo-instructions}
if [ -n "${DATA:-}" ]; then
    "$PYTHON" "$HERE/prepare.py" --local "$DATA"
else
    "$PYTHON" "$HERE/prepare.py"
fi
"$PYTHON" -m rpo_trainer run "$HERE/chain.yaml" --run-dir "$RUN" \
    model.name_or_path="$MODEL" \
    eval.data='[]' eval.generate=null eval.score=null \
    stages.general-sft.num_train_epochs=1 \
    stages.rpo-math.data.train.0.max_rows=350 \
    stages.rpo-math.data.generate.max_new_tokens=192 stages.rpo-math.num_train_epochs=2 \
    stages.rpo-code.data.train.0.max_rows=150 \
    stages.rpo-code.data.generate.max_new_tokens=192 \
    stages.rpo-instructions.data.train.0.max_rows=175 \
    stages.rpo-instructions.data.generate.max_new_tokens=256 \
    "$@"
[ "$MEASURE" = none ] && exit
# shellcheck disable=SC2086  # MEASURE is a list of options
"$PYTHON" "$HERE/measure.py" "$RUN" $MEASURE
