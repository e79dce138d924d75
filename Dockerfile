# Two images of one source:
#
#     docker build --target operator --tag demoreset-operator:0.1.0 .
#     docker build --target trainer --tag demoreset-trainer:0.1.0 .
#
# The trainer's torch is PyPI's, which brings CUDA and runs on CPUs too. Another one, for example the
# much smaller one for CPUs alone:
#
#     --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu

FROM python:3.11-slim AS base
# Libraries ask for the user's home and name. Where the root is read-only, /tmp is a volume.
ENV HOME=/tmp \
    PATH=/opt/demoreset/bin:$PATH \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1
# tini: workers' processes fork others, and somebody must wait for those that lost their parent.
# Its version is that of the base image's Debian, which keeps no older ones.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --user-group --no-log-init --no-create-home --home-dir /tmp \
        --shell /usr/sbin/nologin demoreset

FROM base AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/demoreset
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./

FROM build AS build-operator
COPY operator operator
COPY trainer trainer
COPY demos demos
RUN pip install --constraint constraints.txt '.[operator]'

FROM build AS build-trainer
ARG TORCH_INDEX=""
# By itself, for it is large and changes seldom. Another index need not have what torch needs.
RUN pip install --constraint constraints.txt \
        ${TORCH_INDEX:+--no-deps --index-url "$TORCH_INDEX"} torch
COPY operator operator
COPY trainer trainer
COPY demos demos
RUN pip install --constraint constraints.txt '.[trainer,elastic]'

FROM base AS operator
COPY --from=build-operator /opt/demoreset /opt/demoreset
ENV PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /tmp
EXPOSE 8080
ENTRYPOINT ["tini", "--", "demoreset-operator"]

FROM base AS trainer
COPY --from=build-trainer /opt/demoreset /opt/demoreset
ENV PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /tmp
EXPOSE 9400
ENTRYPOINT ["tini", "--", "demoreset"]
