#!/usr/bin/env bash
# From nothing to the figures of docs/QUALITY.md, on a machine with a GPU: trains the tiny models that are not there
# yet, measures levels and methods on all three, times attention calls, writes tables and pictures.
#
#   make quality    # or: WEIGHTS=outputs MINUTES=12 PYTHON=python3 benchmarks/reproduce_quality.sh
#
# WEIGHTS: where tiny_hunyuan/export and tiny_cogvideox/export are, or come to be after MINUTES of training each.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} WEIGHTS=${WEIGHTS:-outputs} MINUTES=${MINUTES:-12}
RESULTS=benchmarks/results

for model in wan hunyuan cogvideox; do
    options=(--model "$model" --inner eager)
    if [ "$model" != wan ]; then
        if [ ! -d "$WEIGHTS/tiny_$model/export" ]; then
            "$PYTHON" examples/tiny_wan/train.py --model "$model" --out "$WEIGHTS/tiny_$model" \
                --minutes "$MINUTES" --total-minutes "$MINUTES"
        fi
        options+=(--weights "$WEIGHTS/tiny_$model/export")
    fi
    "$PYTHON" benchmarks/levels.py "${options[@]}" --json "$RESULTS/levels_$model.json"
    "$PYTHON" benchmarks/quality.py "${options[@]}" --clips 2 --json "$RESULTS/quality_$model.json"
done
"$PYTHON" benchmarks/attention.py --shapes wan --presets cubes,first_order,dropped,splits,svg_ear,svg2 \
    --densities .6,.3,.2,.1 --json "$RESULTS/attention_presets.json"
"$PYTHON" benchmarks/measuring.py --json "$RESULTS/measuring.json"
"$PYTHON" benchmarks/levels_plot.py --levels "$RESULTS"/levels_{wan,hunyuan,cogvideox}.json \
    --before "$RESULTS/levels_before.json" --png docs/levels.png --page docs/QUALITY.md
"$PYTHON" benchmarks/quality_plot.py --quality "$RESULTS"/quality_{wan,hunyuan,cogvideox}.json \
    --attention "$RESULTS/attention_presets.json" --measuring "$RESULTS/measuring.json" \
    --png docs/quality.png --page docs/QUALITY.md
