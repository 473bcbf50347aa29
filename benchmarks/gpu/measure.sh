#!/usr/bin/env bash
# Measure fusedit on this machine's GPU, in at most 7 minutes; --help lists the settings.
exec "${PY:-python3}" "$(dirname "${BASH_SOURCE[0]}")/measure.py" "$@"
