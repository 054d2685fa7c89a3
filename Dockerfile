# One image for everything that runs: the API, the MLflow and Prefect servers beside it, and the worker (compose.yaml).
# The model is not in it: the API serves a Bento from the store mounted at /app/var/bentoml, which `make package` fills.
# For one self-contained image of a Bento instead: bentoml containerize language_model:latest

# Installed here, with pip, uv and their caches, and copied below without them.
FROM python:3.11-slim-bookworm AS packages

# The registry's torch for Linux brings gigabytes of CUDA; say TORCH_BACKEND=auto or cu130 where there is a card.
ARG TORCH_BACKEND=cpu
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    UV_COMPILE_BYTECODE=1 \
    VIRTUAL_ENV=/opt/packages
WORKDIR /app
COPY requirements.lock ./
RUN pip install "$(grep '^uv==' requirements.lock)" \
    && uv venv "$VIRTUAL_ENV" \
    && uv pip install --no-cache --torch-backend "$TORCH_BACKEND" --requirement requirements.lock
COPY pyproject.toml README.md ./
COPY src src
RUN uv pip install --no-cache --no-deps .

FROM python:3.11-slim-bookworm

# OpenMP for torch, git for the worker's DVC; a pinned version of either is gone from the archive with the next security update.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 app \
    && install --directory --owner app --group app /app /app/var /app/var/bentoml /app/var/mlflow /app/var/prefect
COPY --from=packages /opt/packages /opt/packages
ENV PATH=/opt/packages/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    OMP_WAIT_POLICY=PASSIVE \
    BENTOML_HOME=/app/var/bentoml \
    BENTOML_DO_NOT_TRACK=True \
    DO_NOT_TRACK=1 \
    GRADIO_ANALYTICS_ENABLED=False \
    HF_HUB_OFFLINE=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    PREFECT_HOME=/app/var/prefect \
    PREFECT_SERVER_ANALYTICS_ENABLED=false
WORKDIR /app

USER 1000:1000
EXPOSE 3000
# start-period: the packages take a while to import, and the bundles are read whole before the first answer.
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:3000/readyz', timeout=4)"]
# Inside a container all addresses; compose.yaml publishes it on the host's loopback alone.
CMD ["bentoml", "serve", "language_model:latest", "--host", "0.0.0.0", "--port", "3000"]
