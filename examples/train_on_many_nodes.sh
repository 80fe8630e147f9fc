#!/bin/sh
# Trains on several machines; run the same line on each of them. Every process reads the whole order of examples and takes its
# part; process 0 writes the run folder, which the machines share. After a failure, the same line continues the run.
#
#   psann-fast tokenize --data corpus/ --out tokens/                       once, on one machine: text, .jsonl or .parquet files
#   NODES=4 HEAD=node0.example:29500 sh examples/train_on_many_nodes.sh    on each of the four
#   NODES=1 PER_NODE=2 HEAD=localhost:0 sh examples/train_on_many_nodes.sh --device cpu --max-steps 20     here, to try it
set -eu
exec torchrun --nnodes="$NODES" --nproc-per-node="${PER_NODE:-gpu}" --rdzv-backend=c10d --rdzv-endpoint="$HEAD" --rdzv-id="${RUN_ID:-psann-fast}" \
  -m psann_fast.cli train --data "${TOKENS:-tokens}" --out "${RUN:-runs/many-nodes}" --resume auto --ddp on "$@"
# More than a GPU holds: --fsdp shares weights, gradients and optimizer out; --activation-checkpointing trades time for memory.
