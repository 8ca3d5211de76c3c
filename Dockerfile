# syntax=docker/dockerfile:1
#
#   docker build --target cpu    -t budgeted-lora:cpu .      ONNX Runtime on a CPU
#   docker build --target gpu    -t budgeted-lora:gpu .      CUDA and TensorRT 10; run with --gpus all
#   docker build --target jetson -t budgeted-lora:jetson .   on a Jetson; run with --runtime nvidia
#
#   docker run --rm -v budgeted-runs:/home/app/budgeted-lora/runs budgeted-lora:cpu \
#     python -m distill --budget 0.25
#
# Every stage installs with `make install`, which `make test` of continuous integration uses too.

ARG CPU_BASE=python:3.11.14-slim-bookworm
ARG GPU_BASE=nvcr.io/nvidia/tensorrt:26.05-py3
ARG JETSON_BASE=nvcr.io/nvidia/l4t-tensorrt:r10.3.0-devel


FROM ${CPU_BASE} AS cpu
# Address of the index of torch's CPU builds, from PyTorch's installation page; without it pip takes
# the build for CUDA, several gigabytes larger.
ARG TORCH_INDEX=
# rtx (engines ahead of time) exists for x86-64 only; elsewhere: --build-arg EXTRAS=cpu,serve
ARG EXTRAS=cpu,rtx,serve
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends make \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 app \
 && useradd --create-home --uid 10001 --gid app app \
 && install -d -o app -g app /home/app/.cache /home/app/budgeted-lora /home/app/budgeted-lora/runs
USER 10001:10001
WORKDIR /home/app/budgeted-lora
COPY --chown=app:app . .
RUN --mount=type=cache,target=/home/app/.cache/pip,uid=10001,gid=10001 \
    PIP_EXTRA_INDEX_URL="$TORCH_INDEX" make install EXTRAS="$EXTRAS"
ENV PATH=/home/app/budgeted-lora/.venv/bin:$PATH
CMD ["make", "help"]


FROM ${GPU_BASE} AS gpu
ARG EXTRAS=gpu,serve
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends make python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 app \
 && useradd --create-home --uid 10001 --gid app app \
 && install -d -o app -g app /home/app/.cache /home/app/budgeted-lora /home/app/budgeted-lora/runs
USER 10001:10001
WORKDIR /home/app/budgeted-lora
COPY --chown=app:app . .
# The base image has tensorrt for its own Python: the environment must see those packages.
RUN --mount=type=cache,target=/home/app/.cache/pip,uid=10001,gid=10001 \
    python3 -m venv --system-site-packages .venv \
 && make install EXTRAS="$EXTRAS"
ENV PATH=/home/app/budgeted-lora/.venv/bin:$PATH
CMD ["make", "help"]


FROM ${JETSON_BASE} AS jetson
ARG EXTRAS=cpu,serve
ARG TORCH_INDEX=
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends make python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 app \
 && useradd --create-home --uid 10001 --gid app app \
 && install -d -o app -g app /home/app/.cache /home/app/budgeted-lora /home/app/budgeted-lora/runs
USER 10001:10001
WORKDIR /home/app/budgeted-lora
COPY --chown=app:app . .
# JetPack's own TensorRT runs the engines; torch, which the device does not need for that, is the
# CPU build.
RUN --mount=type=cache,target=/home/app/.cache/pip,uid=10001,gid=10001 \
    python3 -m venv --system-site-packages .venv \
 && PIP_EXTRA_INDEX_URL="$TORCH_INDEX" make install EXTRAS="$EXTRAS"
ENV PATH=/home/app/budgeted-lora/.venv/bin:$PATH
CMD ["make", "help"]
