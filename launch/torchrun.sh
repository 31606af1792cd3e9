#!/usr/bin/env bash
# Train on one machine with several processes, which start again together when one of them dies:
#
#   launch/torchrun.sh [options of torchrun --] --config F [key=value ...]
#
#   NPROC          processes; by default one for each GPU, and one where there is none
#   MAX_RESTARTS   how often they start again before the run has failed; by default 3
#   PYTHON         by default python
#
# Ends with the status of the run: 0 done, 75 stopped on request (the same command goes on), 2 wrong config, 1 failed.
# SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C go to the processes, which may take as long as they need to write their
# checkpoint; torchrun itself would kill them after 30 seconds. So does the end of the terminal, as SIGTERM.

if [ $# -eq 0 ] || [ "$1" = --help ] || [ "$1" = -h ]; then
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  exit $(($# == 0 ? 2 : 0))
fi
options=()
has_options=
for argument in "$@"; do
  if [ "$argument" = -- ]; then has_options=1; fi
done
if [ -n "$has_options" ]; then
  while [ "$1" != -- ]; do
    options+=("$1")
    shift
  done
  shift
fi
if [ -z "${NPROC:-}" ]; then
  if nvidia-smi -L >/dev/null 2>&1; then NPROC=gpu; else NPROC=1; fi
fi

# torchrun ends with 1 whatever its processes ended with. They write their status here, see `ssl_eo.cluster.finish`.
SSL_EO_EXIT_FILE=$(mktemp) || exit 1
export SSL_EO_EXIT_FILE
trap 'rm -f "$SSL_EO_EXIT_FILE"' EXIT

asked= # the signal that came last
told=  # the processes that have got it
for name in INT TERM USR1 USR2; do
  # shellcheck disable=SC2064  # the name is meant as it is now
  trap "asked=$name told=" "$name"
done
trap "asked=TERM told=" HUP # the terminal is gone; under nohup it is not heard

set -m # torchrun gets a process group of its own: Ctrl-C in a terminal reaches this script alone
"${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node="$NPROC" \
  --max-restarts="${MAX_RESTARTS:-3}" ${options[@]+"${options[@]}"} -m ssl_eo train "$@" &
agent=$!
set +m

# Whether process $1 has a handler for the signal. It would die of it while Python is still starting.
listens() {
  local caught
  caught=$(sed -n 's/^SigCgt:[[:space:]]*//p' "/proc/$1/status" 2>/dev/null)
  [ -n "$caught" ] && (((16#$caught >> ($(kill -l "$asked") - 1)) & 1))
}

pass_on() {
  local child
  for child in $(grep -lsx "PPid:[[:space:]]*$agent" /proc/[0-9]*/status); do
    child=${child//[!0-9]/}
    if [[ " $told " != *" $child "* ]] && listens "$child" && kill -s "$asked" "$child"; then
      told="$told $child"
    fi
  done
}

while kill -0 "$agent" 2>/dev/null; do
  if [ -n "$asked" ]; then
    pass_on # again and again: some may be about to start
  fi
  sleep 0.5
done
wait "$agent"
status=$?
if [ "$status" -eq 0 ]; then
  status=$(cat "$SSL_EO_EXIT_FILE")
fi
exit "${status:-0}"
