"""Runs every example of docs/http_api.md against a server: inference_http_test starts it.

usage: http_api_examples.py DOCUMENT URL
The server: model stories260K, knowledge base `harbour`, as the document has it. Python and shell
examples must end well; answers shown as JSON must have the fields that a real one has, errors must be
word for word what the server says.
"""
import json
import re
import subprocess
import sys
import urllib.error
import urllib.request

document, url = sys.argv[1], sys.argv[2]
with open(document, encoding="utf-8") as file:
    blocks = [re.sub(r"^    ", "", block, flags=re.M)
              for block in re.findall(r"(?:^    .*\n)+", file.read(), re.M)]


def run(command, block):
    done = subprocess.run([*command, block.replace("localhost:8000", url.removeprefix("http://"))],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip(), (block, done.stdout, done.stderr)
    return done.stdout


def post(body):
    request = urllib.request.Request(url + "/v1/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        return json.load(error)


def same_fields(shown, real, where):
    assert type(shown) is type(real), (where, shown, real)
    if isinstance(shown, dict):
        assert set(shown) == set(real), (where, sorted(shown), sorted(real))
        for key in shown:
            same_fields(shown[key], real[key], f"{where}.{key}")
    elif isinstance(shown, list):
        same_fields(shown[0], real[0], where + "[0]")


kinds = []
for block in blocks:
    kind = block.split()[0]
    if kind == "from":
        out = run([sys.executable, "-c"], block)
        assert "0 [" in out and "Story" in out, out
    elif kind == "curl":
        for command in re.split(r"^(?=curl )", block, flags=re.M)[1:]:
            out = run(["bash", "-c"], command.replace("curl -", "curl -f", 1))
            if '"stream": true' in command:
                assert out.count("data: ") >= 8 and out.endswith("data: [DONE]\n\n"), out
    elif kind.startswith('{"error"'):
        shown = json.loads(block)
        field, value = re.match(r"(\w+): (\S+) is", shown["error"]["message"]).groups()
        real = post({"model": "stories260K", "prompt": "a", field: json.loads(value)})
        assert shown == real, (shown, real)
    elif kind.startswith('{"knowledge_base"'):
        shown = json.loads(block)
        real = post({"model": "stories260K", "prompt": "Lily had a red boat", "max_tokens": 70,
                     "memory": {"knowledge_base": "harbour"}})
        same_fields(shown, real["memory"], "memory")
        kind = "{memory"
    else:
        raise AssertionError(f"no way to check this example: {block}")
    kinds.append(kind.split('"')[0])
    print("ok", block.splitlines()[0])
assert sorted(set(kinds)) == ["curl", "from", "{", "{memory"], kinds
