"MLflow on PostgreSQL and S3, as the overlay `team` has it: a training is tracked there, and stays; saved, restored, upgraded"

import base64
import json
import re
import subprocess

import pytest

from gpuml.base.loading import load
from gpuml.training.fit import fit
from tests.conftest import ROOT
from tests.manifests import find, mlflow_server, pod_of, prepared, render, started_as
from tests.postgres import find_programs, postgres
from tests.s3 import KEY, SECRET

pytestmark = pytest.mark.skipif(
    not find_programs(), reason="no PostgreSQL: install it (Debian, as root: make postgres) to test MLflow on it"
)
PAGE = (ROOT / "docs" / "administrator.md").read_text()
OLD = "6953534de441"  # a schema of MLflow 3.0


def on_page(pattern: str) -> str:
    (found,) = re.findall(pattern, PAGE, re.M)
    return found


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    "The overlay, with the secrets that k8s/secrets.sh made; what an administrator fills in are the tests' keys for S3"
    copy = prepared(tmp_path_factory.mktemp("administrator"))
    destination = (
        f"AWS_ACCESS_KEY_ID={KEY}\nAWS_SECRET_ACCESS_KEY={SECRET}\nMLFLOW_ARTIFACTS_DESTINATION=s3://mlflow/team\n"
    )
    (copy / "overlays" / "team" / "secrets" / "mlflow.env").write_text(
        destination + "MLFLOW_S3_ENDPOINT_URL=http://minio:9000\n"
    )
    return render(copy, "team")


@pytest.fixture(scope="module")
def database(team):
    "A server with the user, password and database of Secret postgres"
    data = find(team, "Secret", "postgres")["data"]
    secret = {key: base64.b64decode(value).decode() for key, value in data.items()}
    with postgres(secret["POSTGRES_USER"], secret["POSTGRES_PASSWORD"], secret["POSTGRES_DB"]) as server:
        yield server


@pytest.fixture
def here(database, s3):
    "Where the names that MLflow's pod knows are on this machine"
    return {"@postgres:5432": f"@127.0.0.1:{database.port}", "http://minio:9000": s3.endpoint}


def store(team, here) -> str:
    "The address that the server is given"
    return started_as(team, "Deployment", "mlflow", here)[1]["MLFLOW_BACKEND_STORE_URI"]


def recorded(uri: str, experiment: str) -> dict:
    "All that MLflow has of an experiment's only run and its model"
    import mlflow

    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    history = {
        name: [(m.step, m.value, m.timestamp) for m in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }
    versions = [(str(v.version), v.run_id, v.status) for v in client.search_model_versions("name = 'tickets'")]
    return {"run": run.to_dictionary(), "history": history, "versions": versions}


def test_a_training_is_tracked_and_stays(project, team, database, here, s3, tmp_path):
    "Saved, restored into a fresh database as the page says, and started again, the server has the same"
    import mlflow

    with mlflow_server(team, tmp_path, here, workers=1) as port:
        uri = f"http://127.0.0.1:{port}"
        run = fit(load("dev", [f"tracking.uri={uri}", "tracking.register=tickets"]))
        first = recorded(uri, "test")
        database.stop()
        database.start()
        assert recorded(uri, "test") == first  # as after an eviction of the database's pod
    spool = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    losses = [(step, m["loss"]) for _, step, kind, m in spool if kind == "update"]
    assert first["run"]["info"]["status"] == "FINISHED" and first["run"]["info"]["run_name"] == run.id
    assert [point[:2] for point in first["history"]["loss"]] == losses and len(losses) == run.metrics["updates"] > 4
    params = first["run"]["data"]["params"]
    assert (params["train.epochs"], params["train.batch_size"]) == ("2", "8")
    assert first["run"]["data"]["metrics"]["accuracy"] == run.metrics["accuracy"]
    assert first["versions"] == [("1", first["run"]["info"]["run_id"], "READY")]

    place = {"env": {"POSTGRES_DB": "mlflow"}}
    dump = database.shell(on_page(r"-- sh -c '(pg_dump .+)' > mlflow.dump$"), **place)
    assert dump.returncode == 0 and dump.stdout, dump.stderr
    restored = database.shell(on_page(r"-- sh -c '(dropdb .+)' < mlflow.dump$"), **place, input=dump.stdout)
    assert restored.returncode == 0, restored.stderr

    with mlflow_server(team, tmp_path, here, workers=1) as port:
        uri = f"http://127.0.0.1:{port}"
        assert recorded(uri, "test") == first
        mlflow.set_tracking_uri(uri)
        answer = mlflow.transformers.load_model("models:/tickets/1")(["parcel late"])
        assert answer[0]["label"] == run.predict(["parcel late"]).labels[0]
        kept = mlflow.artifacts.load_text(f"runs:/{first['run']['info']['run_id']}/certificate.json")
        assert kept == (run.folder / "certificate.json").read_text()
    from gpuml.base.storage import Storage

    assert Storage(s3.endpoint).find("s3://mlflow/team/*/*/artifacts/certificate.json")


def test_schemas(team, database, here, tmp_path):
    "An older one is brought up to date by the server, and by the page's command; on a newer one the server does not start"
    import mlflow
    import sqlalchemy
    from alembic.command import upgrade
    from mlflow.store.db.utils import _get_alembic_config, _get_latest_schema_revision
    from mlflow.store.tracking.dbmodels.initial_models import Base

    places = {}
    for name in ("started", "upgraded"):
        database.ask("postgres", f"create database {name}")
        places[name] = here | {f"@127.0.0.1:{database.port}/mlflow": f"@127.0.0.1:{database.port}/{name}"}
        address = store(team, places[name])
        Base.metadata.create_all(sqlalchemy.create_engine(address, poolclass=sqlalchemy.NullPool))
        upgrade(_get_alembic_config(address), OLD)
        kept = "insert into experiments (name, lifecycle_stage, artifact_location) values ('kept', 'active', 's3://x')"
        database.ask(name, kept)
    with mlflow_server(team, tmp_path, places["started"], workers=1) as port:
        found = mlflow.MlflowClient(f"http://127.0.0.1:{port}").search_experiments()
        assert "kept" in {e.name for e in found}
    (patch,) = json.loads(on_page(r"patch deployment/mlflow --type=json -p '(.+)'$"))
    assert patch["path"] == "/spec/template/spec/containers/0/command"
    command, environment = started_as(team, "Deployment", "mlflow", places["upgraded"], patch["value"])
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert database.ask("upgraded", "select version_num from alembic_version") == _get_latest_schema_revision()
    assert database.ask("upgraded", "select name from experiments") == "kept"
    database.ask("upgraded", "update alembic_version set version_num = 'ffffffffffff'")
    refused = pytest.raises(AssertionError, match="Detected out-of-date database schema")
    with refused, mlflow_server(team, tmp_path, places["upgraded"], workers=1):
        pass


def test_its_password_is_asked_for(team, database, here):
    "By TCP, as MLflow comes; a managed one's may have any characters; and the pod's own probe says that it is ready"
    import sqlalchemy

    address = store(team, here)
    with sqlalchemy.create_engine(address).connect() as right:
        assert right.scalar(sqlalchemy.text("select 1")) == 1
    with pytest.raises(sqlalchemy.exc.OperationalError, match="password authentication failed"):
        sqlalchemy.create_engine(re.sub(r":[0-9a-f]{40}@", ":wrong@", address)).connect()
    database.ask("postgres", "create role managed login password 'p@s:s/w%rd'")
    managed = re.sub(r"//mlflow:[0-9a-f]{40}@", "//managed:p%40s:s%2Fw%25rd@", address)
    with sqlalchemy.create_engine(managed).connect() as encoded:
        assert encoded.scalar(sqlalchemy.text("select current_user")) == "managed"
    (container,) = pod_of(find(team, "StatefulSet", "postgres"))["containers"]
    assert database.shell(container["readinessProbe"]["exec"]["command"][2]).returncode == 0


def test_the_image_has_the_driver(team):
    "The `-full` image has mlflow[db] of its version, and so whichever driver SQLAlchemy takes for postgresql://"
    from importlib.metadata import requires, version

    import sqlalchemy

    (container,) = pod_of(find(team, "Deployment", "mlflow"))["containers"]
    assert container["image"].endswith(f":v{version('mlflow')}-full")
    driver = sqlalchemy.make_url("postgresql://a@b/c").get_dialect().driver
    drivers = {re.match(r"[\w-]+", r)[0].removesuffix("-binary") for r in requires("mlflow") if 'extra == "db"' in r}
    assert driver in drivers
