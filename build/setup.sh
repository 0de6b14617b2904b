#!/usr/bin/env bash
# Makes a machine ready: system packages (only those that are missing) and .venv with the server in it.
#
#   build/setup.sh            what is needed to run the server and the demo
#   build/setup.sh --tests    and what the tests and benchmarks need besides
#
# Debian and Ubuntu, as root or with sudo. Running it again is fast and changes nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Program to look for -> package that holds it.
RUN_PROGRAMS=(runc:runc conmon:conmon catatonit:catatonit skopeo:skopeo umoci:umoci ip:iproute2 nft:nftables mkfs.ext4:e2fsprogs /usr/bin/python3:python3)
TEST_PROGRAMS=(dockerd:docker.io podman:podman rootlesskit:rootlesskit newuidmap:uidmap docker-registry:docker-registry busybox:busybox-static wrk:wrk stress-ng:stress-ng curl:curl wget:wget git:git npm:npm node:nodejs certutil:libnss3-tools rsync:rsync sqlite3:sqlite3)

wanted=("${RUN_PROGRAMS[@]}")
if [[ "${1:-}" == "--tests" ]]; then
    wanted+=("${TEST_PROGRAMS[@]}")
fi

say() { printf '\033[1m==>\033[0m %s\n' "$*" >&2; }

as_root() {
    if [[ "$(id -u)" == 0 ]]; then "$@"; else sudo "$@"; fi
}

missing_packages() {
    local entry
    for entry in "${wanted[@]}"; do
        PATH="$PATH:/usr/sbin:/sbin" command -v "${entry%%:*}" >/dev/null 2>&1 || printf '%s\n' "${entry##*:}"
    done
}

# Some packages start services of their own; the tests start registries and Docker Engines themselves, and a system on
# which nothing of that ran before stays so.
install_without_services() {
    local policy=/usr/sbin/policy-rc.d made="" unit package
    local -a resting=()
    local -A units=([docker.io]="docker.socket docker containerd" [docker-registry]="docker-registry" [podman]="podman.socket podman podman-auto-update.timer")
    for package in "$@"; do
        for unit in ${units[$package]:-}; do
            systemctl is-active --quiet "$unit" 2>/dev/null || resting+=("$unit")
        done
    done
    if [[ ! -e $policy ]]; then
        made=yes
        printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" > /dev/null
        as_root chmod 755 "$policy"
    fi
    local status=0
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$@" || status=$?
    [[ -z $made ]] || as_root rm -f "$policy"
    ((status == 0)) || return "$status"
    if [[ -d /run/systemd/system ]] && ((${#resting[@]})); then
        as_root systemctl disable --now "${resting[@]}"
    fi
}

install_packages() {
    local -a packages
    mapfile -t packages < <(missing_packages)
    ((${#packages[@]})) || return 0
    if ! command -v apt-get >/dev/null; then
        say "please install these programs with this system's package manager: ${packages[*]}"
        exit 1
    fi
    say "installing ${packages[*]}"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get update -q
    install_without_services "${packages[@]}"
    # Where the command-line program is a package of its own; benchmarks compare with it.
    if ! command -v docker > /dev/null && [[ " ${packages[*]} " == *" docker.io "* ]]; then
        install_without_services docker-cli
    fi
    local -a left
    mapfile -t left < <(missing_packages)
    if ((${#left[@]})); then
        say "still missing after the installation: ${left[*]}"
        exit 1
    fi
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3; do
        [[ -n "$candidate" ]] || continue
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    if command -v apt-get >/dev/null; then
        as_root env DEBIAN_FRONTEND=noninteractive apt-get update -q >&2
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends python3 python3-venv >&2
        if python3 -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))'; then
            printf 'python3\n'
            return
        fi
    fi
    say "Python 3.11 or newer with venv is needed; name it with PYTHON=/path/to/python"
    exit 1
}

make_environment() {
    local stamp=.venv/.ready wanted_stamp python
    wanted_stamp="$(cksum < pyproject.toml)"
    if [[ -x .venv/bin/hiver && -f $stamp && "$(cat "$stamp")" == "$wanted_stamp" ]]; then
        return
    fi
    say "making .venv"
    if ! .venv/bin/python -c '' 2>/dev/null; then
        python="$(find_python)"
        "$python" -m venv --clear .venv
    fi
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
    printf '%s\n' "$wanted_stamp" > "$stamp"
}

# Two runs at a time would undo each other.
mkdir -p .build
exec 9> .build/setup.lock
flock 9
install_packages
make_environment
