# SPDX-License-Identifier: Apache-2.0
# Images of vLLM with `--attention-backend retrieval`. Two targets:
#
#   docker build --target cuda .     on vLLM's own image (the default)
#   docker build --target cpu .      on Debian, for machines without a GPU; `make image` builds it and asks it something
#
# Both run as uid 2000 and need nothing writable but /tmp; what they compile and learn goes to /cache if that can be
# written. Keys for the routes under /retrieval: environment or files, see docs/operate.md.
ARG CUDA_BASE=vllm/vllm-openai:v0.32.0
ARG CPU_BASE=debian:bookworm-slim

# ---- the wheel, of which both take a copy
FROM ${CPU_BASE} AS wheel
# Versions are Debian's stable ones.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* && python3 -m venv /opt/build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY vllm_retrieval_attn vllm_retrieval_attn
RUN /opt/build/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# ---- for machines without a GPU
FROM ${CPU_BASE} AS cpu
ARG TORCH_VERSION=2.13.0
# Where pip does not find the CPU build of torch by itself, an index of CPU wheels: --build-arg TORCH_INDEX=...
ARG TORCH_INDEX=
# g++: vLLM's CPU platform compiles with it.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates g++ libnuma1 python3 python3-dev \
    python3-venv && rm -rf /var/lib/apt/lists/* && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY deploy/cpu /src/cpu
# torchvision and the like come in builds that do not fit the CPU build of torch.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir "torch==${TORCH_VERSION}+cpu" ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
    && pip install --no-cache-dir /src/cpu && pip uninstall -y torchvision torchaudio torchcodec
COPY --from=wheel /wheels /wheels
# Whole seconds: layers keep no others, and Numba compares times with those of its cache.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir /wheels/*.whl && pip uninstall -y torchvision torchaudio torchcodec \
    && find /opt/venv/lib -path '*/vllm_retrieval_attn/*.py' -exec touch -d 2026-01-01 {} + \
    && useradd --uid 2000 --home-dir /home/vllm --create-home vllm && install -d -o 2000 -g 2000 /cache /opt/numba
ENV VLLM_PLUGINS=retrieval VLLM_RETRIEVAL_CACHE=/cache NUMBA_CACHE_DIR=/opt/numba HOME=/home/vllm \
    HF_HOME=/cache/huggingface VLLM_CACHE_ROOT=/tmp/vllm VLLM_NO_USAGE_STATS=1
USER 2000
WORKDIR /home/vllm
# The CPU workers' kernels, compiled for this builder's kind of processor; another one compiles its own at start.
RUN python -m vllm_retrieval_attn.bench.search --tokens 4096 --shape 2,2,64 --layers 1 --rows 64
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/retrieval/ready', timeout=4)"]
LABEL org.opencontainers.image.title="vllm-retrieval-attn" \
    org.opencontainers.image.description="vLLM with retrieval attention, for machines without a GPU" \
    org.opencontainers.image.licenses="Apache-2.0"
ENTRYPOINT ["vllm", "serve"]

# ---- on vLLM's own image
FROM ${CUDA_BASE} AS cuda
USER 0
COPY --from=wheel /wheels /wheels
# vLLM, torch and CUDA stay those of the base image.
# hadolint ignore=DL3013
RUN python3 -m pip install --no-cache-dir --upgrade-strategy only-if-needed /wheels/*.whl \
    && find / -xdev -path '*/vllm_retrieval_attn/*.py' -exec touch -d 2026-01-01 {} + \
    && install -d -o 2000 -g 2000 /cache /opt/numba
ENV VLLM_PLUGINS=retrieval VLLM_RETRIEVAL_CACHE=/cache NUMBA_CACHE_DIR=/opt/numba HF_HOME=/cache/huggingface \
    VLLM_CACHE_ROOT=/tmp/vllm
USER 2000
RUN python3 -m vllm_retrieval_attn.bench.search --tokens 4096 --shape 2,2,64 --layers 1 --rows 64
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=600s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/retrieval/ready', timeout=4)"]
LABEL org.opencontainers.image.title="vllm-retrieval-attn" \
    org.opencontainers.image.description="vLLM with retrieval attention, contexts that GPU memory does not limit" \
    org.opencontainers.image.licenses="Apache-2.0"
ENTRYPOINT ["vllm", "serve"]
