#!/usr/bin/env bash
# Runs all measurements that require a GPU, part by part, most important first.
#
#     bash benchmarks/gpu.sh                    # a Llama of the 1 B class, bfloat16 weights, full fine-tuning
#     SIZE=tiny bash benchmarks/gpu.sh          # the same on a very small model, also on a CPU: tests the script
#     PACKED=.gpu bash benchmarks/gpu.sh        # first unpacks the output of gpu_prepare.sh
#
# OUT     directory for results: DATE-DEVICE.jsonl, a line for each run; DATE-DEVICE.md, their output; and
#         DATE-DEVICE.done, the finished parts, which the next call skips
# ONLY    names of the parts to run, finished or not: "uf ratio4"
# LIMIT   seconds for the whole script (default 530); parts that have not started by then are left for the next call
# PYTHON  Python interpreter with this project's requirements; without TRL, only rpo-trainer is measured
# PACKED  output folder of gpu_prepare.sh; its wheels, model and data are unpacked into WORK (default runs/gpu)
# MODEL   directory of SmolLM2-135M-Instruct for the part `chain`, DATA the folder of its JSONL files; both default
#         to the unpacked ones, and without them the part is skipped
#
# Ends with a list of what was skipped or failed; exit code 1 if anything failed.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
SIZE=${SIZE:-1b}
OUT=${OUT:-benchmarks/results}
LIMIT=${LIMIT:-530}
ONLY=${ONLY:-}
PACKED=${PACKED:-}
WORK=${WORK:-$PWD/runs/gpu}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTHONUNBUFFERED=1  # a part that is stopped keeps what it printed

if [ -n "$PACKED" ]; then
    export PYTHONPATH="$PYTHONPATH:$WORK/site"
    if [ ! -d "$WORK/site" ]; then
        "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$WORK/site" \
            "$PACKED"/wheels/*.whl || exit 1
    fi
    if [ -f "$PACKED/data.tar.gz" ] && [ ! -d "$WORK/data" ]; then
        mkdir -p "$WORK/data"
        tar -xzf "$PACKED/data.tar.gz" -C "$WORK/data" || exit 1
    fi
    if compgen -G "$PACKED/model.part-*" >/dev/null && [ ! -d "$WORK/model" ]; then
        mkdir -p "$WORK/model"
        cat "$PACKED"/model.part-* | tar -x -C "$WORK/model" --strip-components 1 || exit 1
    fi
    [ -d "$WORK/model" ] && MODEL=${MODEL:-$WORK/model}
    [ -d "$WORK/data" ] && DATA=${DATA:-$WORK/data}
fi

device=$("$PYTHON" - <<'PROGRAM'
import torch
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
PROGRAM
) || { echo "$PYTHON has no torch" >&2; exit 1; }
if [ "$device" = cpu ] && [ "$SIZE" != tiny ]; then
    echo "no GPU is visible; SIZE=tiny tries the script on a CPU" >&2
    exit 2
fi
mkdir -p "$OUT"
stem=$OUT/$(date +%F)-$(echo "$device" | tr ' [:upper:]' '-[:lower:]')$([ "$SIZE" = tiny ] && echo -tiny)
lines=$stem.jsonl
report=$stem.md
finished=$stem.done
touch "$finished"
[ -s "$report" ] || echo "# $(date +%F), $device, $SIZE" >"$report"

lengths="--lengths benchmarks/ultrafeedback.csv"
if [ "$SIZE" = tiny ]; then
    # Everything is small: this tests the script; the figures mean nothing.
    model="--size tiny --vocabulary 512 --rounds 1"
    half=""
    uf="--batch 4 --micro 2 --steps 2" ratio2="--batch 2 --micro 1 --steps 2 --prompt 32 --response 16"
    ratio4="--batch 2 --micro 2 --steps 2 --prompt 64 --response 16" k4="$ratio2"
    sft="--batch 4 --micro 2 --steps 2 --prompt 16 --response 32"
    head="--tokens 64 --hidden 32 --vocabulary 512 --rounds 1"
    ablation="--batch 4 --micro 2" scaling="--points 2 --steps 2 --prompt 32 --response 16 --batch 1 --micro 1"
    tile="--points 1 --steps 1 --tile-mib 1"
    plan="--size tiny --vocabulary 512 --prompt 32 --response 16 --steps 2" plan_lora="$plan --lora 4"
    sample="--size tiny --vocabulary 512 --prompts 8 --prompt 16 --batch 16 --max-new-tokens 64 --mean 12 --rounds 1"
    chain="defaults.warmup_steps=0"
    for data in eval.preferences eval.nll code-sft.train code-sft.eval general-sft.train general-sft.eval dpo.train; do
        [[ $data = eval.* ]] || data=stages.${data/./.data.}
        chain+=" $data.0.max_rows=4"
    done
    chain+=" eval.nll.1.max_rows=4 eval.nll.2.max_rows=4"
    chain+=" stages.code-sft.data.train.1.max_rows=4 stages.general-sft.data.train.1.max_rows=4"
    for stage in math code instructions; do
        chain+=" stages.rpo-$stage.data.train.0.max_rows=4 stages.rpo-$stage.data.generate.max_new_tokens=8"
    done
    measure="--rows 1 --max-new-tokens 8 --stages model,rpo-instructions"
    quickstart="eval.data.0.size=8"
    for stage in code-sft general-sft; do
        quickstart+=" stages.$stage.max_steps=2 stages.$stage.warmup_steps=0"
        quickstart+=" stages.$stage.data.train.0.size=200 stages.$stage.data.eval.0.size=8"
    done
    quickstart+=" stages.dpo.data.train.0.size=100 stages.rpo.data.train.0.size=100"
else
    model="--size $SIZE --rounds 2"
    half="--dtype bfloat16"
    uf="--batch 32 --micro 8 --steps 5" ratio2="--batch 16 --micro 8 --steps 5 --prompt 512 --response 256"
    ratio4="--batch 16 --micro 8 --steps 5 --prompt 1024 --response 256"
    k4="--batch 8 --micro 4 --steps 5 --prompt 512 --response 256"
    sft="--batch 32 --micro 16 --steps 5"
    head="--tokens 8192 --hidden 2048 --vocabulary 128256"
    ablation="--batch 32 --micro 8" scaling="--rounds 1 --batch 4 --micro 4"
    tile="--batch 4 --micro 4 --steps 2"
    plan="--size 1b --dtype bfloat16 --batch 16 --micro 8 --steps 3 $lengths"
    plan_lora="--size 8b --dtype bfloat16 --lora 16 --batch 8 --micro 4 --steps 3"
    sample="--size 1b --dtype bfloat16 --k 8 --prompts 16 --prompt 256 --batch 128 --max-new-tokens 192 --rounds 2"
    chain="" measure="--rows 400 --max-new-tokens 256 --batch-size 1000 --stages model,general-sft,dpo,rpo-instructions"
    quickstart=""
fi
peers=""
"$PYTHON" -c 'import trl' 2>/dev/null || { peers="--peers"; echo "no TRL: only rpo-trainer is measured" | tee -a "$report"; }

skipped=() failed=()

# part NAME SECONDS COMMAND...: runs COMMAND for at most SECONDS, unless too little time is left.
part() {
    local name=$1 limit=$2 left=$((LIMIT - SECONDS)) start=$SECONDS status log
    shift 2
    if [ -n "$ONLY" ]; then
        [[ " $ONLY " == *" $name "* ]] || return 0
    elif grep -qx "$name" "$finished"; then
        return 0
    fi
    if [ "$left" -lt 25 ]; then
        skipped+=("$name (no time left)")
        return 0
    fi
    [ "$limit" -le "$left" ] || limit=$left
    echo "== $name, at ${SECONDS} s"
    log=$stem.$name.log
    timeout -s INT -k 15 "$limit" "$@" >"$log" 2>&1  # pytest prints its failures when it is interrupted
    status=$?
    {
        printf '\n## %s\n\n`%s`\n\n' "$name" "$*"
        tail -n 60 "$log"
        printf '\n%s s, status %s\n' "$((SECONDS - start))" "$status"
    } | tee -a "$report" | tail -n 25
    if [ "$status" = 124 ] || [ "$status" = 137 ]; then
        skipped+=("$name (stopped after $limit s)")
    elif [ "$status" != 0 ]; then
        failed+=("$name (status $status)")
    else
        echo "$name" >>"$finished"
    fi
}

# bench NAME SECONDS SCRIPT OPTIONS...
bench() {
    local name=$1 limit=$2 script=$3
    shift 3
    part "$name" "$limit" "$PYTHON" "benchmarks/$script" "$@" --json "$lines"
}

# shellcheck disable=SC2086,SC2046  # the options are lists of words
{
    # Tests that require a GPU have `gpu` in their names. Few threads leave the CPU to the other parts.
    part tests 400 env OMP_NUM_THREADS=2 "$PYTHON" -m pytest -q -p no:cacheprovider -rf --tb=short --durations=10 -k gpu \
        tests/gpu $(grep -rl 'needs a GPU' tests --include 'test_*.py' --exclude-dir bench --exclude-dir gpu)
    part quickstart 150 "$PYTHON" -m rpo_trainer run recipes/quickstart/chain.yaml --run-dir "$WORK/quickstart" \
        --no-report $quickstart
    bench uf 100 step.py $model $half $uf $lengths $peers
    bench ratio4 90 step.py $model $half $ratio4 $peers
    bench k4 90 step.py $model $half $k4 --k 4 $peers
    bench memory 100 step.py $model $half $uf $lengths --memory $peers
    if [ -n "${MODEL:-}" ]; then
        part chain 420 env MODEL="$MODEL" DATA="${DATA:-}" RUN="$WORK/chain" PYTHON="$PYTHON" MEASURE="$measure" \
            sh recipes/real/short.sh --no-report $chain
    elif [ -z "$ONLY" ]; then
        skipped+=("chain (no MODEL)")
    fi
    bench plan 60 planned.py $plan
    bench plan-lora 90 planned.py $plan_lora
    bench sample 110 sample.py $sample
    bench sft 90 sft.py $model $half $sft $peers
    [ "$device" = cpu ] || bench attention 90 attention.py --rounds 2
    bench scaling 90 scaling.py $model $half $scaling
    bench tile 90 scaling.py --over tile $model $half $tile
    bench compile 100 step.py $model $half $uf $lengths --peers ours-compiled
    bench head 60 head.py $head $half
    bench ratio2 90 step.py $model $half $ratio2 $peers
    bench ablation 60 ablation.py $model $half $ablation
}

{
    printf '\n%s s in total. ' "$SECONDS"
    [ ${#skipped[@]} = 0 ] && echo "Nothing was skipped." || echo "Skipped: $(IFS=';'; echo "${skipped[*]}")."
    [ ${#failed[@]} = 0 ] || echo "Failed: $(IFS=';'; echo "${failed[*]}")."
} | tee -a "$report"
[ ${#failed[@]} = 0 ]
