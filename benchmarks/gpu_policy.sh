#!/usr/bin/env bash
# A policy of 54 M parameters on word problems, conservative and aggressive: planned for seven minutes on one
# H100 or H200, pre-training included; not run yet. Nothing but the CAPO of this checkout, with the extras trl and tasks.
#
#     benchmarks/gpu_policy.sh OUT            # OUT/runs.tar.gz and OUT/summary.json
#     benchmarks/gpu_policy.sh OUT --rehearse # the same stages on a CPU in two minutes, for no result
#
# Where altair is installed:
#     capo bench larger --report OUT/runs.tar.gz --output results/gpu/larger_policy
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?give the folder to write to}
here=results/gpu/larger_policy
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
export TOKENIZERS_PARALLELISM=false PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
python=${PYTHON:-python3}
if [ "${2:-}" = --rehearse ]; then
  set -- --tiny "$here/tiny.toml" --seconds "${SECONDS_IN_ALL:-120}" --jobs 2
else
  set --
fi
"$python" -c 'from capo.cli.main import main; main()' bench larger "$here/grid.toml" --runs "${RUNS:-runs/larger}" --output "$out" "$@"
