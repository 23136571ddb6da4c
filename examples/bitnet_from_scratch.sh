#!/usr/bin/env bash
# A BitNet b1.58 of its own: ternary weights, int8 activations, SubLN and squared ReLU, from random weights.
#
#     examples/bitnet_from_scratch.sh OUT [options of spicerack train]     # --steps 2000: some hours on two cores
#
# The text is the standard library of the Python that runs this, the sizes are those of assets/stdlib-lm. What comes out
# is a folder in transformers' own `bitnet` layout where it can be, and runs on additions.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$1
shift
model=$here/../assets/stdlib-lm
mkdir -p "$out.text"
PYTHONPATH=$here python - "$out.text/train.txt" <<'PYTHON'
import sys
from pathlib import Path
from stdlib_corpus import build_corpus, join

Path(sys.argv[1]).write_text(join(build_corpus().library), encoding="utf-8")
PYTHON
spicerack train --from-scratch "$model/config.json" -o "$out" --scheme ternarya8 --twin bitnet \
  --data "$out.text" --eval "$model/heldout.txt" --schedule two-stage --lr 1e-3 --weight-decay 0.1 --bf16 "$@"
