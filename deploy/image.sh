#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Build the CPU image and ask it something, as a pod would run it: uid 2000, a root that cannot be written, /tmp alone.
# Needs root, and buildah or docker. MODEL: a model's folder. BASE: the image to build on; IMAGE_BUILD_FLAGS: more for the build
# (where packages come from a folder of this machine, say).
set -euo pipefail
cd "$(dirname "$0")/.."
# A copy that uid 2000 can read: weights are often written for their owner alone.
MODEL=$(mktemp -d)
cp -rL "${1:?a model folder}"/. "$MODEL"
chmod -R a+rX "$MODEL"
BASE=${BASE:-debian:bookworm-slim}
NAME=vllm-retrieval-attn:cpu
PORT=${PORT:-8123}
read -ra flags <<<"${IMAGE_BUILD_FLAGS:-}"

if command -v buildah >/dev/null; then
  buildah bud --isolation chroot --format docker --target cpu --build-arg CPU_BASE="$BASE" "${flags[@]}" -t "$NAME" .
  container=$(buildah from "$NAME")
  root=$(buildah mount "$container")
else
  docker build --target cpu --build-arg CPU_BASE="$BASE" "${flags[@]}" -t "$NAME" .
fi

arguments=(/model --attention-backend retrieval --served-model-name m --host 127.0.0.1 --port "$PORT" --max-model-len 4096
  --max-num-seqs 2 --enforce-eager --kv-cache-memory-bytes 300000000
  --additional-config '{"retrieval": {"host_memory_gb": 0.2, "resident_tokens": 1024}}')
if command -v buildah >/dev/null; then
  # A namespace of mounts: the image read-only, and over it what a pod has.
  export root MODEL
  # shellcheck disable=SC2016
  env -i PATH="$PATH" root="$root" MODEL="$MODEL" unshare --mount --fork --kill-child bash -c '
    mount --bind "$root" "$root" && mount -t proc proc "$root/proc" && mount --rbind /dev "$root/dev" && mount --rbind /sys "$root/sys"
    mount --bind "$root/home" "$root/home"
    mkdir -p "$root/model" && mount --bind -o ro "$MODEL" "$root/model"
    mount -t tmpfs tmpfs "$root/tmp" && chmod 1777 "$root/tmp"
    mount -o remount,bind,ro "$root" && mount -o remount,bind,ro "$root/home"
    cd / && exec chroot --userspec 2000:2000 "$root" /usr/bin/env -i PATH=/opt/venv/bin:/usr/bin:/bin HOME=/home/vllm \
      VLLM_PLUGINS=retrieval VLLM_RETRIEVAL_CACHE=/cache NUMBA_CACHE_DIR=/opt/numba VLLM_CACHE_ROOT=/tmp/vllm \
      RETRIEVAL_VIEW_KEY=view vllm serve "$@"
  ' bash "${arguments[@]}" &
  server=$!
  trap 'kill -9 $server 2>/dev/null; wait $server 2>/dev/null || true; buildah umount "$container" >/dev/null; buildah rm "$container" >/dev/null; rm -r "$MODEL"' EXIT
else
  id=$(docker run -d --read-only --tmpfs /tmp --user 2000 --network host -e RETRIEVAL_VIEW_KEY=view \
    -v "$MODEL":/model:ro "$NAME" "${arguments[@]}")
  trap 'docker rm -f "$id" >/dev/null; rm -r "$MODEL"' EXIT
fi

for _ in $(seq 300); do
  curl -sf "http://127.0.0.1:$PORT/retrieval/ready" >/dev/null && break
  if [ -n "${server:-}" ] && ! kill -0 "$server" 2>/dev/null; then echo "the server ended"; exit 1; fi
  sleep 1
done
prompt=$(printf 'Attention sinks are tokens. %.0s' $(seq 400))
answer=$(curl -sf "http://127.0.0.1:$PORT/v1/completions" -H 'Content-Type: application/json' \
  -d "{\"model\": \"m\", \"prompt\": \"$prompt\", \"max_tokens\": 8, \"temperature\": 0}")
echo "$answer"
echo "$answer" | grep -q '"path":"faiss"' || { echo "the answer did not read the host"; exit 1; }
echo "the image answers as uid 2000 on a root that can not be written"
