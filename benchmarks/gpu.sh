#!/usr/bin/env bash
# All measurements that need a GPU, most important first, within LIMIT seconds (nine minutes on one H200).
#
#     bash benchmarks/gpu.sh                    # a Llama of the 1 B class, bfloat16 weights, full fine-tuning
#     SIZE=tiny bash benchmarks/gpu.sh          # the same on a very small model, on a CPU too: is it all in order?
#     WHEELS=dir bash benchmarks/gpu.sh         # first installs the wheels of that folder, and nothing they need
#
# OUT     where results go: DATE-DEVICE.jsonl, a line for each run, and DATE-DEVICE.md, what they printed
# PYTHON  the interpreter, with this project's requirements; without TRL ours is measured alone
# ONLY    names of parts, to run no others: "uf ratio4"
#
# Ends with what was skipped for want of time or failed; status 1 if anything failed.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
SIZE=${SIZE:-1b}
OUT=${OUT:-benchmarks/results}
LIMIT=${LIMIT:-530}
ONLY=${ONLY:-}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

if [ -n "${WHEELS:-}" ]; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl || exit 1
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
echo "# $(date +%F), $device, $SIZE" >"$report"

if [ "$SIZE" = tiny ]; then
    # Everything small: this checks the script, and its figures mean nothing.
    model="--size tiny --vocabulary 512 --rounds 1"
    half=""
    uf="--batch 4 --micro 2 --steps 2" ratio2="--batch 2 --micro 1 --steps 2 --prompt 32 --response 16"
    ratio4="--batch 2 --micro 2 --steps 2 --prompt 64 --response 16" k4="$ratio2"
    sft="--batch 4 --micro 2 --steps 2 --prompt 16 --response 32"
    head="--tokens 64 --hidden 32 --vocabulary 512 --rounds 1"
    ablation="--batch 4 --micro 2" scaling="--points 2 --steps 2 --prompt 32 --response 16 --batch 1 --micro 1"
    tile="--points 1 --steps 1 --tile-mib 1"
else
    model="--size $SIZE --vocabulary 128256 --rounds 3"
    half="--dtype bfloat16"
    uf="--batch 32 --micro 8 --steps 5" ratio2="--batch 16 --micro 8 --steps 5 --prompt 512 --response 256"
    ratio4="--batch 16 --micro 8 --steps 5 --prompt 1024 --response 256"
    k4="--batch 8 --micro 4 --steps 5 --prompt 512 --response 256"
    sft="--batch 32 --micro 16 --steps 5"
    head="--tokens 8192 --hidden 2048 --vocabulary 128256"
    ablation="--batch 32 --micro 8" scaling="--rounds 1 --batch 4 --micro 4"
    tile="--batch 4 --micro 4 --steps 2"
fi
real="--lengths benchmarks/ultrafeedback.csv"
peers=""
"$PYTHON" -c 'import trl' 2>/dev/null || { peers="--peers"; echo "no TRL: ours is measured alone" | tee -a "$report"; }

skipped=() failed=()

# part NAME SECONDS COMMAND...: runs it for at most so long, and not at all where little time is left.
part() {
    local name=$1 limit=$2 left=$((LIMIT - SECONDS)) status
    shift 2
    [ -z "$ONLY" ] || [[ " $ONLY " == *" $name "* ]] || return 0
    if [ "$left" -lt 25 ]; then
        skipped+=("$name (no time left)")
        return 0
    fi
    [ "$limit" -le "$left" ] || limit=$left
    printf '\n## %s\n\n`%s`\n\n' "$name" "$*" >>"$report"
    echo "== $name, at ${SECONDS} s"
    timeout "$limit" "$@" 2>&1 | tail -n 60 | tee -a "$report"
    status=${PIPESTATUS[0]}
    if [ "$status" = 124 ]; then
        skipped+=("$name (stopped after $limit s)")
    elif [ "$status" != 0 ]; then
        failed+=("$name (status $status)")
    fi
}

# bench NAME SECONDS SCRIPT OPTIONS...
bench() {
    local name=$1 limit=$2 script=$3
    shift 3
    part "$name" "$limit" "$PYTHON" "benchmarks/$script" "$@" --json "$lines"
}

# shellcheck disable=SC2086  # the options are lists of words
{
    bench uf 90 step.py $model $half $uf $real $peers
    bench ratio4 90 step.py $model $half $ratio4 $peers
    bench k4 90 step.py $model $half $k4 --k 4 $peers
    bench memory 100 step.py $model $half $uf $real --memory $peers
    # The packed step's kernel, forward and backward, against SDPA in float32, and the head's halves: whole
    # files, those with a test that needs a GPU.
    part tests 120 "$PYTHON" -m pytest -q -p no:cacheprovider $(grep -rl 'needs a GPU' tests --include 'test_*.py' --exclude-dir bench)
    bench head 60 head.py $head $half
    [ "$device" = cpu ] || bench attention 90 attention.py --rounds 2
    bench ratio2 90 step.py $model $half $ratio2 $peers
    bench sft 90 sft.py $model $half $sft $peers
    bench ablation 60 ablation.py $model $half $ablation
    bench tile 90 scaling.py --over tile $model $half $tile
    bench scaling 90 scaling.py $model $half $scaling
}

{
    printf '\n%s s in all. ' "$SECONDS"
    [ ${#skipped[@]} = 0 ] && echo "Nothing was skipped." || echo "Skipped: $(IFS=';'; echo "${skipped[*]}")."
    [ ${#failed[@]} = 0 ] || echo "Failed: $(IFS=';'; echo "${failed[*]}")."
} | tee -a "$report"
[ ${#failed[@]} = 0 ]
