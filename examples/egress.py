"""What an agent may reach: one API, with a key that the agent never sees, and nothing else.

    pip install hiver-py
    HIVER_GATEWAY_URL=http://localhost:10000 python examples/egress.py

The API is a server in this very program, so that nothing else is needed; `override.host` leads its name there.
"""

import asyncio
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import hiver

API_KEY = "sk-only-the-api-knows"


class Api(BaseHTTPRequestHandler):
    """Greets whoever has the key."""

    def do_GET(self) -> None:
        known = self.headers["Authorization"] == f"Bearer {API_KEY}"
        print(f"the API got a request {'with' if known else 'without'} the key")
        answer = b"welcome\n" if known else b"who are you?\n"
        self.send_response(200 if known else 401)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


AGENT = """
import os, urllib.error, urllib.request
for url in ("http://api.example/v1/greeting", "http://api.example/admin", "http://elsewhere.example/"):
    try:
        print(url, "->", urllib.request.urlopen(url).read().decode().strip())
    except urllib.error.HTTPError as error:
        print(url, "->", error.code, error.read().decode().strip())
print("the agent can see a key:", "sk-only" in str(os.environ))
"""


async def main() -> None:
    api = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=api.serve_forever, daemon=True).start()
    sandbox = await hiver.get_or_create_sandbox(
        "my-agent",
        hiver.SandboxConfig(
            image="hiversh/python:3.13-alpine",
            egress=[
                hiver.EgressRule(
                    access="allow",
                    host="api.example",
                    methods=["GET"],
                    paths=["/v1/**"],
                    override=hiver.EgressOverride(
                        host=f"127.0.0.1:{api.server_port}",
                        headers={"Authorization": f"Bearer {API_KEY}"},
                    ),
                ),
            ],
        ),
    )
    await sandbox.write_file("/workspace/agent.py", AGENT)
    result = await sandbox.exec("python3 /workspace/agent.py")
    print(result["stdout"] + result["stderr"], end="")

    # Every attempt is on record, and no record has the key.
    async for event in sandbox.get_events_stream():
        if event.type == "egress.request":
            shown = (event.headers or {}).get("Authorization", "none")
            print(f"event {event.id}: {event.access} {event.method} {event.host}{event.path}, authorization: {shown}")
        elif event.type == "egress.response":
            print(f"event {event.id}: status {event.status} for event {event.request_id}")
        elif event.type == "exec.response":
            break

    await sandbox.shutdown()
    await sandbox.aclose()


asyncio.run(main())
