#!/usr/bin/env bash
# Download the packages that a machine with torch but no network lacks, as wheels for Python 3.12
# (8 MB), to whl/ next to this file. Run it where pip works; measure.py installs them from there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
python=${PY:-python3}
mkdir -p whl
have() {
    compgen -G "whl/$1-*.whl" >/dev/null
}
fetch() {                               # NAME-OF-WHEEL REQUIREMENT
    local platforms=() glibc
    have "$1" && return
    for glibc in manylinux_2_28 manylinux_2_24 manylinux_2_17 manylinux2014; do
        platforms+=(--platform "${glibc}_x86_64")
    done
    "$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 \
        --implementation cp "${platforms[@]}" -d whl "$2"
}
fetch webdataset "webdataset>=1.0,<2"
fetch braceexpand braceexpand
fetch hjson hjson
fetch annotated_types annotated-types
fetch typing_inspection typing-inspection
fetch pydantic "pydantic==2.12.5"
fetch pydantic_core "pydantic-core==2.41.5"                # the version that this pydantic requires
fetch torchao "torchao==0.18.0"
if ! have deepspeed; then               # PyPI has only its sources; no kernel is built here
    venv=$(mktemp -d)
    trap 'rm -rf "$venv"' EXIT
    "$python" -m venv "$venv"
    "$venv/bin/pip" install -q "setuptools<82" wheel packaging
    DS_BUILD_OPS=0 DS_BUILD_STRING='' "$venv/bin/pip" wheel -q --no-deps --no-build-isolation \
        -w whl "deepspeed>=0.19,<0.20"
fi
du -sh whl
ls whl
