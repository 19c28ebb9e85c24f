#!/usr/bin/env bash
# What CAPO costs on a GPU: checks, then the core and whole update steps; under ten minutes on an H100.
#
#     benchmarks/gpu.sh [--quick] [--tiny] [--only STAGE] [--output DIRECTORY]
#
# Stages: checks (80 s on an H200), core (70 s), step0 (1.5 B) and step1 (7 B, 85 s a cycle), each with its limit, 510 s
# in all at most. Where device time is short, run them one by one with --only into one directory: every stage's record
# stands by itself, the report is of all that are there (--report writes it anew), and says which are missing.
#
# Needs torch with CUDA, triton, trl and pytest. Without a GPU: a dry run at tiny sizes.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
exec "$python" -m capo.lab.gpu.command "$@"
