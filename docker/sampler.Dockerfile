# The sampler. From the repository's root: docker build -f docker/sampler.Dockerfile -t vesper-sampler .
# Pin the base by its digest with --build-arg BASE=python:3.11-slim-bookworm@sha256:...
ARG BASE=python:3.11-slim-bookworm
# hadolint ignore=DL3006
FROM ${BASE}

# Both images have the same user: keys in the run directory are for their owner alone. tini reaps what nobody waits for.
# g++: Triton builds its launchers when the engine starts, and torch.compile its kernels for the CPU.
# libnuma1: vLLM for the CPU loads it; the trainer has it because the two images differ in their worker alone.
ARG USER_ID=10001
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid "${USER_ID}" vesper \
    && useradd --uid "${USER_ID}" --gid vesper --home-dir /cache --no-create-home vesper \
    && install --directory --owner vesper --group vesper --mode 700 /cache /runs

WORKDIR /vesper
ENV PYTHONPATH=/vesper PYTHONUNBUFFERED=1 HOME=/cache NVIDIA_DRIVER_CAPABILITIES=compute,utility

# ENGINE: gpu, or cpu for machines without one. EXTRAS: more of pyproject.toml's. CONSTRAINTS: a file with other exact
# versions than those of constraints/gpu.txt or cpu.txt. The indexes are read by pip itself.
ARG ENGINE=gpu
ARG EXTRAS="math"
ARG CONSTRAINTS
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
COPY pyproject.toml install.py ./
COPY constraints/ constraints/
COPY docker/engines.py docker/
# hadolint ignore=SC2086
RUN python docker/engines.py "${ENGINE}" sampler ${EXTRAS}

# Last, because it changes most.
COPY protocol/ protocol/
COPY policy/ policy/
COPY sampler/ sampler/
COPY doctor/ doctor/
COPY trainer/ trainer/
COPY launch/ launch/
COPY recipes/ recipes/
RUN python -m compileall -q .

LABEL org.opencontainers.image.title="vesper sampler" \
      org.opencontainers.image.description="Samples and rewards groups of completions with vLLM" \
      org.opencontainers.image.licenses="Apache-2.0"
USER ${USER_ID}:${USER_ID}
VOLUME ["/runs", "/cache"]
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=60s --timeout=50s --start-period=60s --retries=5 \
    CMD ["python", "-m", "protocol.health", "sampler"]
ENTRYPOINT ["tini", "--", "python", "-m", "sampler"]
CMD ["--run", "/runs/gsm8k"]
