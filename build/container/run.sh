#!/usr/bin/env bash
# Builds the image and starts the server in a container beside the Docker Engine of DOCKER_HOST or of the usual socket.
#
#   build/container/run.sh [arguments of `hiver serve`]
#
# BASE    image to build on                                   [debian:bookworm-slim]
# NAME    of the image and the container                      [hiver]
# PORT    on this machine's 127.0.0.1                         [10000]
# DATA    folder on the Engine's host                         [/var/lib/hiver-in-docker]
# PRIVILEGES  what lets it into namespaces of sandboxes       [--privileged]
# BUILD_OPTIONS, RUN_OPTIONS   for `docker build` and `docker run`
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

NAME="${NAME:-hiver}"
PORT="${PORT:-10000}"
DATA="${DATA:-/var/lib/hiver-in-docker}"
# Words as a shell takes them, so that options may have blanks.
words() { xargs -r -n 1 printf '%s\n' <<< "$1"; }
mapfile -t build_options < <(words "${BUILD_OPTIONS:-}")
mapfile -t privileges < <(words "${PRIVILEGES:---privileged}")
mapfile -t run_options < <(words "${RUN_OPTIONS:---publish 127.0.0.1:$PORT:$PORT}")

# Where the Engine and the runtime below it keep containers: these paths are to mean the same inside.
socket="${ENGINE_SOCKET:-/var/run/docker.sock}"
root="$(docker info --format '{{.DockerRootDir}}')"
state="${ENGINE_STATE:-/run/docker}"
containerd="${CONTAINERD_STATE:-/run/containerd}"

docker build --tag "$NAME" --file build/container/Containerfile \
    ${BASE:+--build-arg "BASE=$BASE"} "${build_options[@]}" .

# Privileged and in the host's PID and cgroup namespaces: what guards a sandbox reaches into its namespaces from outside.
# The root file systems that the Engine mounts later must show inside (rslave). It makes folders that are missing.
options=(
    --detach --name "$NAME" --init --pid host --cgroupns host "${privileges[@]}"
    --volume "$socket:/var/run/docker.sock"
    --volume "$root:$root:rslave" --volume "$state:$state" --volume "$containerd:$containerd"
    --volume "$DATA:$DATA" --volume /sys/fs/cgroup:/sys/fs/cgroup --volume /dev:/dev
)
docker run "${options[@]}" "${run_options[@]}" "$NAME" --port "$PORT" --data-dir "$DATA" "$@"
