#!/usr/bin/env bash
# Installs this checkout on every machine of a TPU slice, and runs one command on all of them at once.
#
#   scripts/launch/tpu_vm.sh install my-slice us-west4-a
#   scripts/launch/tpu_vm.sh run my-slice us-west4-a train --config configs/gcr/imagenet_resnet.py --workdir /mnt/runs/r50
#
# DRY_RUN=1 prints what would be called instead.  The processes find each other; a run that was stopped goes on when
# the same line is called again.
set -euo pipefail

usage() {
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

call() {
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

[[ $# -ge 3 ]] || usage
action=$1 slice=$2 zone=$3
shift 3
on_all() {
  call gcloud compute tpus tpu-vm ssh "$slice" --zone="$zone" --worker=all --command="$1"
}

case $action in
  install)
    [[ $# -eq 0 ]] || usage
    archive=$(mktemp --suffix=.tar.gz)
    trap 'rm -f "$archive"' EXIT
    git -C "$(dirname "$0")/../.." archive --format=tar.gz --output="$archive" HEAD
    call gcloud compute tpus tpu-vm scp "$archive" "$slice:subspace_jax.tar.gz" --zone="$zone" --worker=all
    on_all "mkdir -p subspace_jax && tar -xzf subspace_jax.tar.gz -C subspace_jax && cd subspace_jax \
      && python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt '.[train,tpu,text]'"
    ;;
  run)
    [[ $# -ge 1 ]] || usage
    on_all "cd subspace_jax && exec .venv/bin/subspace-jax $(printf '%q ' "$@")"
    ;;
  *) usage ;;
esac
