# One image for everything that runs: the API, and the MLflow and Prefect servers beside it (compose.yaml).
# The model is not in it: the API serves a Bento from the store mounted at /app/var/bentoml, which `make package` fills.
# For one self-contained image of a Bento instead: bentoml containerize language_model:latest
FROM python:3.11-slim

# The registry's torch for Linux brings gigabytes of CUDA; say TORCH_BACKEND=auto or cu130 where there is a card.
ARG TORCH_BACKEND=cpu

RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 app \
    && install --directory --owner app --group app /app /app/var /app/var/bentoml /app/var/mlflow /app/var/prefect

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    OMP_WAIT_POLICY=PASSIVE \
    BENTOML_HOME=/app/var/bentoml \
    BENTOML_DO_NOT_TRACK=True \
    DO_NOT_TRACK=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    PREFECT_HOME=/app/var/prefect \
    PREFECT_SERVER_ANALYTICS_ENABLED=false

WORKDIR /app
COPY requirements.lock ./
RUN pip install "$(grep '^uv==' requirements.lock)" \
    && uv pip install --system --no-cache --torch-backend "$TORCH_BACKEND" --requirement requirements.lock
COPY pyproject.toml README.md bentofile.yaml params.yaml ./
COPY src src
RUN uv pip install --system --no-cache --no-deps .

USER app
EXPOSE 3000
# start-period: the packages take a while to import, and the bundles are read whole before the first answer.
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:3000/readyz', timeout=4)"]
# Inside a container all addresses; compose.yaml publishes it on the host's loopback alone.
CMD ["bentoml", "serve", "language_model:latest", "--host", "0.0.0.0", "--port", "3000"]
