#!/usr/bin/env bash
# One process on each machine with GPUs, over ssh; each process drives all GPUs of its machine.
#
#   scripts/launch/gpus.sh localhost train --config configs/gcr/imagenet_resnet.py --workdir work/r50
#   scripts/launch/gpus.sh node1,node2 train --config configs/gcr/imagenet_resnet.py --workdir /data/runs/r50
#
# The checkout with its .venv lies in the same folder on all machines; the first one is the coordinator.  A machine
# that is named twice runs two processes (to try several on a machine without GPUs).  Ctrl-C or SIGTERM: the run saves
# and leaves with status 75.  DRY_RUN=1 prints what would be called instead.
set -uo pipefail

if [[ $# -lt 2 ]]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
IFS=, read -ra hosts <<<"$1"
shift
folder=$(cd "$(dirname "$0")/../.." && pwd)
address=${hosts[0]}:${PORT:-8476}
command="cd $(printf %q "$folder") && exec .venv/bin/subspace-jax $(printf '%q ' "$@")"

on() { # HOST COMMAND
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%s: %s\n' "$1" "$2"
  elif [[ $1 == localhost ]]; then
    bash -c "$2"
  else
    ssh -o BatchMode=yes "$1" "$2"
  fi
}

members=()
for place in "${!hosts[@]}"; do
  many=""
  ((${#hosts[@]} == 1)) || many="--coordinator $address --num-processes ${#hosts[@]} --process-id $place"
  on "${hosts[$place]}" "$command$many" &
  members+=($!)
done

# The processes agree on the step after which all leave, so that it is enough to tell the first.
# shellcheck disable=SC2329  # called by the trap
leave() {
  on "${hosts[0]}" "pkill -TERM -f '^[^ ]*python[^ ]* [^ ]*subspace-jax $(printf '%q ' "$@")'"
}
trap 'leave "$@"' INT TERM

worst=0
for member in "${members[@]}"; do
  while kill -0 "$member" 2>/dev/null; do
    wait "$member" # a signal ends it early
  done
  wait "$member"
  status=$?
  ((status > worst)) && worst=$status
done
exit "$worst"
