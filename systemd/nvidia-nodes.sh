#!/bin/sh
# Make /dev/nvidia*; a machine without a GPU or without the driver is fine.
set -u

have() { command -v "$1" >/dev/null 2>&1; }

have nvidia-modprobe && nvidia-modprobe -u -c 0
for gpu in /proc/driver/nvidia/gpus/*/information; do
    [ -r "$gpu" ] || continue
    minor=$(sed -n 's/^Device Minor:[[:space:]]*//p' "$gpu")
    have nvidia-modprobe && nvidia-modprobe -c "${minor:-0}"
done
# The driver's own library makes whatever is still missing.
have nvidia-smi && nvidia-smi -L
exit 0
