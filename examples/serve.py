"""Serve a controller on a local Ray and ask it once: python examples/serve.py RUN IMAGE QUESTION [BUDGET_MS].

`ray-ctrl serve RUN` does the same until Ctrl-C; on a cluster: `serve deploy cluster/manifests/serve.yaml`.
"""

import json
import sys
from pathlib import Path
from urllib.request import Request, urlopen

import ray
from ray import serve

from ray_ctrl.serve.app import build

run, image, question = sys.argv[1:4]
budget_ms = sys.argv[4] if len(sys.argv) > 4 else "500"

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
serve.run(build({"controller": str(Path(run).absolute()), "late": "cheapest"}), name="ray-ctrl")

form = {"question": question, "budget_ms": budget_ms}
body = b"".join(f'--x\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'.encode() for k, v in form.items())
body += b'--x\r\nContent-Disposition: form-data; name="image"; filename="image"\r\n\r\n'
body += Path(image).read_bytes() + b"\r\n--x--\r\n"
request = Request("http://127.0.0.1:8000/answer", body, {"Content-Type": "multipart/form-data; boundary=x"})
with urlopen(request, timeout=60) as response:
    found = json.load(response)
print(f"answer    {found['answer']}")
print(f"plan      {found['knobs']}")
print(f"latency   {found['latency_ms']:.1f} ms of {budget_ms} ms, {found['queue_ms']:.1f} ms before the run")
serve.shutdown()
ray.shutdown()
