"""Holds deploy/*.yaml and docker/Dockerfile against the built binaries: their flags, environment,
ports, health services and metrics. Starts the servers with the manifests' own arguments.

    deploy_manifests.py BIN_DIRECTORY MODEL_DIRECTORY     (from the repository's root)
"""

import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

import grpc
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

BIN, MODEL = pathlib.Path(sys.argv[1]), sys.argv[2]
failures = []
ANY_CALL = {"memory_server": "/memory3.v1.MemoryService/GetStatus",
            "inference_server": "/memory3.v1.InferenceService/GetModel"}


def check(truth, what):
    if not truth:
        failures.append(what)


def help_of(*command):
    run = subprocess.run([BIN / command[0], *command[1:], "--help"], capture_output=True, text=True)
    check(run.returncode == 0, f"{' '.join(command)} --help: exit code {run.returncode}")
    return run.stdout


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# ---- what there is ----
objects = {}
for path in sorted(pathlib.Path("deploy").glob("*.yaml")):
    for item in yaml.safe_load_all(path.read_text()):
        objects[(item["kind"], item["metadata"]["name"])] = (path.name, item)
dockerfile = pathlib.Path("docker/Dockerfile").read_text()
targets = {m[1]: m[0] for m in re.finditer(r"^FROM \S+ AS (\w+)$(?:(?!^FROM).)*", dockerfile, re.M | re.S)}


def pods():
    for (kind, name), (path, item) in objects.items():
        if kind in ("StatefulSet", "Deployment", "Job"):
            yield f"{path} {kind} {name}", item, item["spec"]["template"]["spec"]


def flags_of(binary, arguments):
    """Known flags and environment of the command that `arguments` begin."""
    text = help_of(binary, *[a for a in arguments[:1] if binary == "trainer"])
    return set(re.findall(r"(?<![\w-])--([\w-]+)", text)), set(re.findall(r"Env:(\w+)", text))


# ---- references between objects, flags, environment ----
for place, item, pod in pods():
    for container in pod["containers"]:
        image, tag = container["image"].rsplit(":", 1)
        target = image.removeprefix("memory3/")
        check(target in targets, f"{place}: docker/Dockerfile has no target {target}")
        entry = re.search(r'ENTRYPOINT \["(\w+)"', targets.get(target, ""))
        binary = entry[1] if entry else target
        version = subprocess.run([BIN / "memory3", "--version"], capture_output=True, text=True).stdout.strip()
        check(tag == version, f"{place}: image tag {tag}, the build's version is {version}")
        flags, environment = flags_of(binary, container["args"])
        for argument in container["args"]:
            if argument.startswith("--"):
                check(argument[2:].split("=")[0] in flags, f"{place}: {binary} has no flag {argument}")
        for variable in container.get("env", []):
            check(variable["name"] in environment, f"{place}: {binary} does not read {variable['name']}")
            key = variable.get("valueFrom", {}).get("secretKeyRef")
            if key:
                secret = objects.get(("Secret", key["name"]))
                check(secret and key["key"] in secret[1]["stringData"], f"{place}: no key {key} in deploy/")
        listens = {int(a.rsplit(":", 1)[1]) for a in container["args"] if re.match(r"--\w*listen=", a)}
        ports = {p["name"]: p["containerPort"] for p in container.get("ports", [])}
        check(set(ports.values()) == listens, f"{place}: ports {ports}, but it listens on {listens}")
        exposed = set(map(int, " ".join(re.findall(r"^EXPOSE (.*)$", targets.get(target, ""), re.M)).split()))
        check(exposed <= listens, f"{place}: the image exposes {exposed}, it listens on {listens}")
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if ports:
                check(container[probe]["grpc"]["port"] in listens, f"{place}: {probe} asks a port nobody listens on")
        mounts = {m["name"] for m in container.get("volumeMounts", [])}
        claims = {c["metadata"]["name"] for c in item["spec"].get("volumeClaimTemplates", [])}
        volumes = {v["name"] for v in pod.get("volumes", [])} | claims
        check(mounts == volumes, f"{place}: mounts {mounts} and volumes {volumes} differ")
    for volume in pod.get("volumes", []):
        if "configMap" in volume:
            config = objects.get(("ConfigMap", volume["configMap"]["name"]))
            check(config, f"{place}: no ConfigMap {volume['configMap']['name']}")
            for text in config[1]["data"].values() if config else []:
                for line in text.splitlines():
                    check(line.split(" = ")[0] in flags, f"{place}: {binary} has no flag {line!r}")
                drain = re.search(r"drain_seconds = (\d+)", text)
                check(drain and int(drain[1]) < pod["terminationGracePeriodSeconds"],
                      f"{place}: is killed before it has drained")
        if "secret" in volume:
            check(("Secret", volume["secret"]["secretName"]) in objects, f"{place}: no Secret {volume['secret']}")

services = {}
for (kind, name), (path, item) in objects.items():
    if kind != "Service":
        continue
    services[name] = {p["port"] for p in item["spec"]["ports"]}
    matched = [c for _, o, pod in pods() for c in pod["containers"]
               if item["spec"]["selector"].items() <= o["spec"]["template"]["metadata"]["labels"].items()]
    check(matched, f"{path} Service {name} selects nothing")
    for port in item["spec"]["ports"]:
        check(all(port["targetPort"] in {p["name"] for p in c["ports"]} for c in matched),
              f"{path} Service {name}: no port {port['targetPort']}")
for place, _, pod in pods():
    for container in pod["containers"]:
        for host, port in re.findall(r"--(?:memory|server)=([a-z-]+):(\d+)", " ".join(container["args"])):
            check(int(port) in services.get(host, ()), f"{place}: no Service {host}:{port}")


# ---- the servers, started with the manifests' arguments ----
def run_server(place, binary, container, entry_arguments, config, substitutes):
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        keys = folder / "api_keys.json"
        keys.write_text(objects[("Secret", "memory3-api-keys")][1]["stringData"]["api_keys.json"])
        (folder / "server.conf").write_text(config)
        ports = {p["containerPort"]: free_port() for p in container["ports"]}
        arguments = []
        for argument in entry_arguments + container["args"]:
            argument = re.sub(r"/etc/memory3/\w+\.conf", str(folder / "server.conf"), argument)
            argument = argument.replace("/etc/memory3-keys/api_keys.json", str(keys))
            for old, new in substitutes.items():
                argument = argument.replace(old, new)
            argument = re.sub(r"^/data$|(?<==)/backup$", str(folder / "data"), argument)
            argument = re.sub(r"0\.0\.0\.0:(\d+)", lambda m: f"127.0.0.1:{ports[int(m[1])]}", argument)
            arguments.append(argument)
        server = subprocess.Popen([BIN / binary, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                grpc_probe = container[probe]["grpc"]
                stub = health_pb2_grpc.HealthStub(grpc.insecure_channel(f"127.0.0.1:{ports[grpc_probe['port']]}"))
                request = health_pb2.HealthCheckRequest(service=grpc_probe.get("service", ""))
                deadline, status = time.monotonic() + 60, None
                while status != health_pb2.HealthCheckResponse.SERVING and time.monotonic() < deadline:
                    try:
                        status = stub.Check(request, timeout=5, wait_for_ready=True).status
                    except grpc.RpcError as error:
                        status = error.code()
                        if server.poll() is not None or status == grpc.StatusCode.NOT_FOUND:
                            break
                check(status == health_pb2.HealthCheckResponse.SERVING, f"{place}: {probe} hears {status}")
            if server.poll() is None:
                # Some metrics appear with the first call; this one is refused for want of a key.
                channel = grpc.insecure_channel(f"127.0.0.1:{ports[container['startupProbe']['grpc']['port']]}")
                try:
                    channel.unary_unary(ANY_CALL[binary])(b"", timeout=10)
                    check(False, f"{place}: takes calls without a key")
                except grpc.RpcError as error:
                    check(error.code() == grpc.StatusCode.UNAUTHENTICATED, f"{place}: {error.code()} without a key")
                metrics = [p["containerPort"] for p in container["ports"] if p["name"] == "metrics"][0]
                with urllib.request.urlopen(f"http://127.0.0.1:{ports[metrics]}/metrics", timeout=10) as page:
                    names = set(re.findall(r"^# TYPE (\w+)", page.read().decode(), re.M))
                check(names, f"{place}: /metrics is empty")
                # What the operator's pages promise; one with labels shows when it has its first value.
                for document in pathlib.Path("docs").glob(f"{binary}.md"):
                    promised = set(re.findall(r"`(memory3_\w+)`", document.read_text()))
                    for name in promised:
                        base = re.sub(r"_(bucket|sum|count)$", "", name)
                        check(name in names or base in names, f"{document}: no metric {name} on {binary}'s page")
        finally:
            server.terminate()
            output, _ = server.communicate(timeout=60)
        check(server.returncode == 0, f"{place}: exit code {server.returncode}\n{output}")


for kind, name, binary, substitutes in (
        ("StatefulSet", "memory-server", "memory_server", {}),
        ("Deployment", "inference-server", "inference_server",
         {"/opt/memory3/models/tiny": MODEL, "--memory=memory-server:7070": "--memory=127.0.0.1:1"})):
    if binary == "inference_server" and not pathlib.Path(MODEL, "config.json").exists():
        print(f"no model in {MODEL}: {binary} was not started")
        continue
    path, item = objects[(kind, name)]
    container = item["spec"]["template"]["spec"]["containers"][0]
    entry = re.search(r"ENTRYPOINT \[(.*)\]", targets[binary])[1].replace('"', "").split(", ")
    config = next(iter(objects[("ConfigMap", name)][1]["data"].values()))
    run_server(f"{path} {kind} {name}", binary, container, entry[1:], config, substitutes)

print("\n".join(failures) or f"{len(objects)} objects agree with the binaries")
sys.exit(1 if failures else 0)
