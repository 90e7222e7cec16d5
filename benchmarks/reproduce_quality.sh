#!/usr/bin/env bash
# From nothing to the figures of docs/QUALITY.md, on a machine with a GPU: trains the tiny models that are not there
# yet, measures quality, levels and error budgets of all three, times attention calls, writes tables and pictures.
#
#   make quality    # or: WEIGHTS=outputs MINUTES=12 PYTHON=python3 benchmarks/reproduce_quality.sh
#
# WEIGHTS: where tiny_hunyuan/export and tiny_cogvideox/export are, or come to be after MINUTES of training each.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} WEIGHTS=${WEIGHTS:-outputs} MINUTES=${MINUTES:-12}
RESULTS=benchmarks/results

for model in wan hunyuan cogvideox; do
    options=(--model "$model")
    if [ "$model" != wan ]; then
        if [ ! -d "$WEIGHTS/tiny_$model/export" ]; then
            "$PYTHON" examples/tiny_wan/train.py --model "$model" --out "$WEIGHTS/tiny_$model" \
                --minutes "$MINUTES" --total-minutes "$MINUTES"
        fi
        options+=(--weights "$WEIGHTS/tiny_$model/export")
    fi
    "$PYTHON" benchmarks/quality.py "${options[@]}" --json "$RESULTS/quality_$model.json"
    "$PYTHON" benchmarks/levels.py "${options[@]}" --clips 2 --json "$RESULTS/levels_$model.json"
    "$PYTHON" benchmarks/error_budget.py "${options[@]}" --no-fixed --clips 4 --json "$RESULTS/error_budget_$model.json"
done
"$PYTHON" benchmarks/attention.py --shapes wan --presets default,first_order,dropped,splits,svg_ear,svg2 \
    --densities .6,.3,.2,.1 --json "$RESULTS/attention_presets.json"
"$PYTHON" benchmarks/measuring.py --json "$RESULTS/measuring.json"
"$PYTHON" benchmarks/quality_plot.py --quality "$RESULTS"/quality_{wan,hunyuan,cogvideox}.json \
    --levels "$RESULTS"/levels_{wan,hunyuan,cogvideox}.json --attention "$RESULTS/attention_presets.json" \
    --measuring "$RESULTS/measuring.json" --png docs/quality.png --page docs/QUALITY.md
"$PYTHON" benchmarks/error_budget_plot.py "$RESULTS"/error_budget_{wan,hunyuan,cogvideox}.json \
    docs/error_budget.png docs/QUALITY.md
