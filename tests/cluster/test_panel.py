"The panel in a real JupyterLab, its job on a real control plane: pending with its reason, running, finished, its notebook"

import json
import os
import shutil

from tests.cluster.cluster import job as holder
from tests.cluster.cluster import phase
from tests.test_lab import (  # noqa: F401
    browser,
    notebook,
    open_notebook,
    page,
    picture,
    pytestmark,
    run_all,
    see_notebook,
    server,
    submit,
    theme,
)


def open_panel(page, server, site):  # noqa: F811
    "The project in JupyterLab's folder, the shipped notebook with a panel at its end"
    place = server[1] / site.namespace
    shutil.copytree(site.folder, place)
    keys = {k: os.environ[k] for k in ("KUBECONFIG", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY") if k in os.environ}
    site.calm(2)  # its job is seen at work, however fast it is
    shipped = json.loads(site.notebook.read_text())
    (place / "train.ipynb").write_text(json.dumps(shipped))
    more = f"import os\nos.environ.update({keys!r})", "%load_ext gpuml", "import gpuml\ngpuml.panel('train.ipynb')"
    (place / "panel.ipynb").write_text(notebook(*more))
    open_notebook(page, server, place / "panel.ipynb")
    run_all(page)
    page.locator(".gpuml-panel").wait_for()


def test_a_job_from_the_mouse(page, server, site):  # noqa: F811
    cluster, namespace = site.cluster, site.namespace
    cluster.admin.create("jobs", namespace, holder("holder", "sleep 6000", gpus=1, priority="gpuml-prod"))
    cluster.wait_pod(namespace, "holder", phase("Running"))
    open_panel(page, server, site)
    page.get_by_role("tab", name="Production").click()
    page.get_by_label("name", exact=True).fill("spring")
    page.get_by_role("button", name="Check", exact=True).click()
    page.locator(".gpuml-checks", has_text="accepted by the API server").wait_for()
    picture(page, "panel-checks.png")
    submit(page, "spring")
    why = page.locator(".gpuml-jobs td", has_text="needs 1 GPU: none of 1 is free")
    why.wait_for()
    page.locator(".gpuml-list button", has_text="spring").click()
    page.locator(".gpuml-panel", has_text="needs 1 GPU").first.wait_for()
    picture(page, "panel-pending.png")
    cluster.admin.delete("jobs", namespace, "holder", propagationPolicy="Background")
    page.locator(".gpuml-jobs .gpuml-running").wait_for()
    see_notebook(page, "spring")
    theme(page, "JupyterLab Dark")
    picture(page, "panel-notebook-dark.png")
