#!/usr/bin/env bash
# What CAPO costs on a GPU: checks, then the core and whole update steps; under ten minutes on an H100.
#
#     benchmarks/gpu.sh [--quick] [--tiny] [--only STAGE] [--output DIRECTORY]
#
# Needs torch with CUDA, triton, trl and pytest. Without a GPU: a dry run at tiny sizes.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
exec "$python" -m capo.lab.gpu.command "$@"
