"""The quick start of the client's documentation, against a server on this machine.

    pip install hiver-py
    HIVER_GATEWAY_URL=http://localhost:10000 python examples/quickstart.py

The image is the documentation's. Where nothing can be pulled, let it stand for a view of this machine's own programs:
put `"hiversh/python:3.13-alpine" = "host"` below `[images]` in the server's configuration.
"""

import asyncio

import hiver


async def main() -> None:
    sandbox = await hiver.get_or_create_sandbox(
        "my-sandbox",
        hiver.SandboxConfig(
            image="hiversh/python:3.13-alpine",
            ttl=1800,
            fs=[
                hiver.LocalFileSystem(
                    backend="local",
                    mount="/workspace",
                    acls=[hiver.ACLRule(path="/workspace/**", access="rw")],
                )
            ],
            egress=[
                hiver.EgressRule(access="allow", host="api.github.com", methods=["GET"], paths=["/repos/*"]),
            ],
        ),
    )
    print("sandbox id:", sandbox.id)

    result = await sandbox.exec("echo hello from the sandbox")
    print("stdout:", result["stdout"].strip(), "- exit code:", result["exit_code"])

    # Everything that happens in a sandbox is an event. The stream goes on for as long as the sandbox lives; here the
    # end of the command is the end of the story.
    async for event in sandbox.get_events_stream():
        print("event", event.id, event.type)
        if event.type == "exec.response":
            break

    await sandbox.shutdown()
    print("the sandbox is shut down")
    await sandbox.aclose()


asyncio.run(main())
