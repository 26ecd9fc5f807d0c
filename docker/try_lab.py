"In the image `dev`: JupyterLab refuses to start without a token, answers who has it, and its kernels know %gpu_train"

import json
import os
import subprocess
import sys
import time
import uuid

import requests
from websocket import create_connection

# as k8s/jupyter/jupyter.yaml starts it
COMMAND, TOKEN = ["sh", "-c", "mkdir -p /work/project && cd /work/project && exec lab"], uuid.uuid4().hex
refused = subprocess.run(COMMAND, capture_output=True, text=True)
assert refused.returncode == 78 and "JUPYTER_TOKEN: must be set" in refused.stderr, refused
print(refused.stderr.strip())

address, login, begun = "127.0.0.1:8888", {"Authorization": f"token {TOKEN}"}, time.monotonic()
with open("/tmp/lab.log", "w") as log:
    lab = subprocess.Popen(COMMAND, env=os.environ | {"JUPYTER_TOKEN": TOKEN}, stdout=log, stderr=log)
while True:  # the path of the pod's probes
    try:
        requests.get(f"http://{address}/api", timeout=5).raise_for_status()
        break
    except requests.RequestException:
        if lab.poll() is not None or time.monotonic() - begun > 120:
            sys.exit(open("/tmp/lab.log").read())
        time.sleep(0.2)
print(f"/api answers after {time.monotonic() - begun:.1f} s")
assert requests.get(f"http://{address}/api/contents", timeout=5).status_code == 403
there = requests.get(f"http://{address}/api/contents", headers=login, timeout=5).json()["content"]
assert {entry["name"] for entry in there} >= {"config", "data", "nbs"}, there

kernel = requests.post(f"http://{address}/api/kernels", headers=login, timeout=60).json()["id"]
socket = create_connection(f"ws://{address}/api/kernels/{kernel}/channels", header=login, timeout=60)
code = "%gpu_train dev train.epoch=1"  # no such setting: the magic answers, and nothing is trained
header = {"msg_id": uuid.uuid4().hex, "msg_type": "execute_request", "session": "try", "username": "", "version": "5.3"}
request = {
    "header": header,
    "parent_header": {},
    "metadata": {},
    "channel": "shell",
    "content": {"code": code, "silent": False},
}
socket.send(json.dumps(request))
said = ""
while True:
    message = json.loads(socket.recv())
    if message["parent_header"].get("msg_id") == header["msg_id"]:
        said += json.dumps(message["content"])
        if message["content"].get("execution_state") == "idle":
            break
assert "did you mean 'train.epochs'" in said, said
print("a kernel knows %gpu_train")
lab.terminate()
lab.wait(30)
