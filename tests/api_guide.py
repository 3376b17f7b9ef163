"""Runs docs/api.md: every ```bash and ```python block, in order, against the real binaries.

    .venv/bin/python tests/api_guide.py BUILD_BIN_DIRECTORY [-v]

Servers run where they find free ports; the guide's addresses are replaced by theirs. A block fails when a command of
it fails. Exits with 77 (skipped) where openai or grpcio are missing; tools/setup installs them into .venv.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile

try:
    import grpc_tools  # noqa: F401
    import openai  # noqa: F401
except ImportError as missing:
    print(f"SKIPPED: {missing}; tools/setup makes .venv with what this test needs")
    sys.exit(77)

# What the answers must hold, by a line of the block.
EXPECTED = {
    "memory3 load towns towns.jsonl": ["towns: version 2, 2 documents", "With memory:", '"finish"', "reads towns"],
    "memory3 kb rollback": ["towns is at version 2"],
    "memory3 snapshot create": ["before-the-update"],
    "curl -sN": ["data: [DONE]", '"knowledge_base":"towns"', "memory3_ready 1"],
    "from openai": ["Aro"],
    "inference_pb2_grpc.InferenceServiceStub": ["[Aro 0-", "FINISH_REASON_", "tiny "],
    "memory_pb2_grpc.MemoryServiceStub": ["towns 2 ", "sel 1", "deleted_entries: 1", "writable: true"],
}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main():
    bin_directory, verbose = os.path.abspath(sys.argv[1]), "-v" in sys.argv
    root = os.getcwd()
    with open("docs/api.md", encoding="utf-8") as guide:
        blocks = re.findall(r"^```(bash|python)\n(.*?)^```$", guide.read(), re.M | re.S)
    missing = [mark for mark in EXPECTED if not any(mark in text for _, text in blocks)]
    if missing or len(blocks) < len(EXPECTED):
        sys.exit(f"docs/api.md has no block with {missing}")
    ports = {7070: free_port(), 7071: free_port(), 8080: free_port()}
    with tempfile.TemporaryDirectory() as directory:
        for name in ("models", "proto"):
            os.symlink(os.path.join(root, name), os.path.join(directory, name))
        environment = dict(
            os.environ,
            PATH=os.pathsep.join([bin_directory, os.path.dirname(sys.executable), os.environ["PATH"]]),
            PYTHONPATH=directory,
            MEMORY3_MEMORY_SERVER=f"127.0.0.1:{ports[7070]}",
            MEMORY3_INFERENCE_SERVER=f"127.0.0.1:{ports[7071]}")
        serve = subprocess.Popen(
            [os.path.join(bin_directory, "memory3"), "serve", "--model", "models/tiny", "--data",
             os.path.join(directory, "data"), "--memory_listen", f"127.0.0.1:{ports[7070]}", "--inference_listen",
             f"127.0.0.1:{ports[7071]}", "--http_listen", f"127.0.0.1:{ports[8080]}"],
            cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            while "Ready" not in (line := serve.stdout.readline()):
                if not line:
                    sys.exit("memory3 serve ended")
            for language, text in blocks:
                for written, used in ports.items():
                    text = text.replace(f"localhost:{written}", f"localhost:{used}")
                command = ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
                ran = subprocess.run(command + [text], cwd=directory, env=environment, timeout=120,
                                     capture_output=True, text=True)
                if verbose:
                    print(text, ran.stdout, ran.stderr, sep="\n--\n")
                if ran.returncode != 0:
                    sys.exit(f"{text}\n{ran.stdout}{ran.stderr}\nended with {ran.returncode}")
                for mark, expected in EXPECTED.items():
                    for part in expected if mark in text else []:
                        if part not in ran.stdout:
                            sys.exit(f"{text}\n{ran.stdout}\ndoes not say {part!r}")
            serve.send_signal(signal.SIGINT)
            if serve.wait(timeout=60) != 0:
                sys.exit(f"memory3 serve ended with {serve.returncode}")
        finally:
            serve.kill()
            serve.wait()
    print(f"{len(blocks)} blocks of docs/api.md ran")


if __name__ == "__main__":
    main()
