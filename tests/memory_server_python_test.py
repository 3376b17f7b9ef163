"""The memory server as a client in another language sees it: Python's grpcio, with messages and methods
that the server itself describes (reflection), no generated code of ours.

    .venv/bin/python tests/memory_server_python_test.py MEMORY_SERVER [-v]

Exits with 77 (skipped) where grpcio is missing; tools/setup installs it into .venv.
"""

import hashlib
import json
import math
import os
import random
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.request

try:
    import grpc
    from google.protobuf import descriptor_pool, message_factory
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
        ProtoReflectionDescriptorDatabase,
    )
except ImportError as missing:
    print(f"SKIPPED: {missing}; tools/setup makes .venv with what this test needs")
    sys.exit(77)

BINARY = ""
SERVICE = "memory3.v1.MemoryService"
DIMENSION = 16
LAYERS, HEAD_DIM = 2, 8
FINGERPRINT = hashlib.sha256(b"writer").digest()
EMBEDDER = hashlib.sha256(b"embedder").digest()
Code = grpc.StatusCode


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def make_record(n, layers=LAYERS, fingerprint=FINGERPRINT):
    """An f32 record of docs/formats.md, version 1."""
    payload = struct.pack("<f", n) * (layers * 2 * HEAD_DIM)
    head = b"m3record" + struct.pack("<IBBH", 1, 1, 0, 0)
    head += struct.pack("<IIIIII", layers, 1, 1, HEAD_DIM, 128, 0)
    head += fingerprint + bytes(32) + struct.pack("<QQI", len(payload), 0, crc32c(payload))
    return head + struct.pack("<I", crc32c(head)) + payload


def make_id(n):
    return hashlib.sha256(f"record {n}".encode()).digest()


def make_vector(n):
    rng = random.Random(n)
    vector = [rng.gauss(0, 1) for _ in range(DIMENSION)]
    length = math.sqrt(sum(x * x for x in vector))
    return [x / length for x in vector]


class Server:
    def __init__(self, directory, *flags):
        self.process = subprocess.Popen(
            [BINARY, "--data", os.path.join(directory, "data"), "--listen", "127.0.0.1:0",
             "--metrics_listen", "127.0.0.1:0", "--backup_root", os.path.join(directory, "backups"),
             *flags],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.log = ""
        self.port = self.metrics_port = None
        while self.metrics_port is None:  # it is the last to be said
            line = self.process.stdout.readline()
            if not line:
                raise RuntimeError(f"the server did not start:\n{self.log}")
            self.log += line
            if found := re.search(r"metrics on port (\d+)", line):
                self.metrics_port = int(found[1])
            if found := re.search(r"gRPC on port (\d+)", line):
                self.port = int(found[1])

    def stop(self, how=signal.SIGTERM):
        if self.process.returncode is None:
            self.process.send_signal(how)
            self.log += self.process.communicate(timeout=60)[0]
        return self.process.returncode


class Client:
    """Calls by name, with messages built from what the server says of itself."""

    def __init__(self, port, key=None, credentials=None):
        target = f"localhost:{port}"
        self.channel = (grpc.secure_channel(target, credentials) if credentials
                        else grpc.insecure_channel(target))
        self.metadata = [("authorization", f"Bearer {key}")] if key else []
        database = ProtoReflectionDescriptorDatabase(self.channel)
        self.services = set(database.get_services())
        self.pool = descriptor_pool.DescriptorPool(database)
        self.service = self.pool.FindServiceByName(SERVICE)

    def method(self, name):
        method = self.service.FindMethodByName(name)
        request = message_factory.GetMessageClass(method.input_type)
        response = message_factory.GetMessageClass(method.output_type)
        kind = (f"{'stream' if method.client_streaming else 'unary'}_"
                f"{'stream' if method.server_streaming else 'unary'}")
        call = getattr(self.channel, kind)(f"/{SERVICE}/{name}", request.SerializeToString,
                                           response.FromString)
        return call, request

    def __call__(self, name, /, **fields):
        call, request = self.method(name)
        response = call(request(**fields), metadata=self.metadata, timeout=30)
        if self.service.FindMethodByName(name).server_streaming:
            response = list(response)
            took = response[0]
        else:
            took = response
        assert took.HasField("took"), f"{name} does not say what time it took"
        return response

    def put(self, header, entries, method="Put"):
        call, request = self.method(method)
        messages = [request(header=header)] + [request(entry=e) for e in entries]
        response = call(iter(messages), metadata=self.metadata, timeout=30)
        assert response.HasField("took")
        return response

    def retrieve(self, *requests):
        call, request = self.method("Retrieve")
        answers, current, records = [], None, {}
        for message in call((request(**r) for r in requests), metadata=self.metadata, timeout=30):
            if current is None:
                current = message
            for piece in message.pieces:
                assert piece.offset == len(records.get(piece.record_id, b""))
                records[piece.record_id] = records.get(piece.record_id, b"") + piece.data
            if message.last:
                assert message.HasField("took")
                if message.error_code:
                    current = message
                answers.append((current, records))
                current, records = None, {}
        return answers


def entry(n, document=None, ordinal=None, record=None, **changes):
    fields = dict(
        source=dict(document_id=document or f"doc-{n % 3}", ordinal=n if ordinal is None else ordinal,
                    title=f"Title {n}", uri=f"https://example.org/{n}", char_begin=10 * n,
                    char_end=10 * n + 10, text=f"text {n}", metadata={"parity": str(n % 2)}),
        record_id=make_id(n), embedding=make_vector(n),
        record=make_record(n) if record is None else record)
    fields.update(changes)
    return fields


def spec(name, **changes):
    fields = dict(
        name=name, writer_fingerprint=FINGERPRINT, codec="CODEC_F32", embedder_fingerprint=EMBEDDER,
        embedding_dimension=DIMENSION, description="of a test",
        geometry=dict(memory_layers=range(LAYERS), kv_heads=1, head_dim=HEAD_DIM, tokens_kept=1,
                      reference_tokens=128))
    fields.update(changes)
    return fields


def query(n, **fields):
    return dict(dict(embedding=make_vector(n), top_k=3), **fields)


class MemoryServerTest(unittest.TestCase):
    def setUp(self):
        self.directory = tempfile.TemporaryDirectory()
        self.addCleanup(self.directory.cleanup)
        self.server = None
        self.addCleanup(lambda: self.server and self.server.stop(signal.SIGKILL))

    def start(self, *flags):
        self.server = Server(self.directory.name, *flags)
        return self.server

    def path(self, name):
        return os.path.join(self.directory.name, name)

    def refused(self, code, *parts):
        """The block's call fails with `code`, and its message has all of `parts`."""
        test = self

        class Refused:
            def __enter__(self):
                return self

            def __exit__(self, kind, error, trace):
                test.assertIsNotNone(error, f"no error, where {code} was due")
                test.assertIsInstance(error, grpc.RpcError)
                test.assertEqual(error.code(), code, error.details())
                for part in parts:
                    test.assertIn(part, error.details())
                return True

        return Refused()

    def failed(self, answer, code, *parts):
        head = answer[0]
        self.assertEqual(head.error_code, code.value[0], head.error_message)
        for part in parts:
            self.assertIn(part, head.error_message)

    def create_with(self, client, name, numbers):
        client("CreateKnowledgeBase", spec=spec(name))
        client.put(dict(knowledge_base=name), [entry(n) for n in numbers])

    def walk_through(self, client):
        """What everybody does, on an empty server: create, put, load, retrieve, an error."""
        created = client("CreateKnowledgeBase", spec=spec("kb")).knowledge_base
        self.assertEqual(created.bytes_per_reference, len(make_record(0)))
        self.assertEqual(client.put(dict(knowledge_base="kb"),
                                    [entry(n) for n in range(6)]).new_records, 6)
        load = client("BeginLoad", knowledge_base="kb", idempotency_key="k", expected_entries=4).load
        client.put(dict(load_id=load.load_id), [entry(n) for n in range(6, 10)], "PutLoad")
        done = client("CommitLoad", load_id=load.load_id, wait=True).load
        self.assertEqual(done.version, 2)
        self.assertEqual(client("Count", knowledge_base="kb").entries, 10)
        (head, records), = client.retrieve(dict(knowledge_base="kb", queries=[query(7)],
                                                with_text=True))
        hits = head.queries[0].hits
        self.assertEqual(hits[0].record_id, make_id(7))
        self.assertAlmostEqual(hits[0].score, 1, places=5)
        self.assertEqual(hits[0].sources[0].text, "text 7")
        exact = sorted(range(10), key=lambda n: -sum(a * b for a, b in zip(make_vector(n), make_vector(7))))
        self.assertEqual([h.record_id for h in hits], [make_id(n) for n in exact[:3]])
        self.assertEqual(records, {make_id(n): make_record(n) for n in exact[:3]})
        with self.refused(Code.NOT_FOUND, "knowledge_base", "nowhere"):
            client("Count", knowledge_base="nowhere")

    def test_reflection_describes_the_services(self):
        client = Client(self.start().port)
        self.assertLessEqual({SERVICE, "grpc.health.v1.Health"}, client.services)
        self.assertGreaterEqual(len(client.service.methods), 28)
        for method in client.service.methods:
            if method.name != "GetRecord":  # of which the first message says it
                self.assertIn("took", method.output_type.fields_by_name, method.name)

    def test_create_put_load_retrieve(self):
        self.walk_through(Client(self.start().port))

    def test_the_same_over_tls_with_keys(self):
        def run(command):
            subprocess.run(command.split(), cwd=self.directory.name, check=True, capture_output=True)

        with open(self.path("names"), "w") as names:
            names.write("subjectAltName=DNS:localhost")
        run("openssl req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -subj /CN=ca -days 2")
        for name in ("server", "client"):
            run(f"openssl req -newkey rsa:2048 -nodes -keyout {name}.key -out {name}.csr -subj /CN={name}")
            run(f"openssl x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial"
                f" -out {name}.pem -days 2 -extfile names")
        keys = [("boss", "acme", {"*": "admin"}), ("writer", "acme", {"kb": "write"}),
                ("reader", "acme", {"kb": "read"}), ("other", "rival", {"*": "admin"})]
        with open(self.path("keys.json"), "w") as file:
            json.dump({"keys": [dict(name=n, sha256=hashlib.sha256(f"{n}-key".encode()).hexdigest(),
                                     tenant=t, knowledge_bases=r) for n, t, r in keys]}, file)
        self.start("--tls_certificate", self.path("server.pem"), "--tls_key",
                   self.path("server.key"), "--tls_client_ca", self.path("ca.pem"), "--api_keys",
                   self.path("keys.json"))

        def read(name):
            with open(self.path(name), "rb") as file:
                return file.read()

        mutual = grpc.ssl_channel_credentials(read("ca.pem"), read("client.key"), read("client.pem"))
        connect = lambda key: Client(self.server.port, key, mutual)
        boss = connect("boss-key")
        self.walk_through(boss)

        with self.refused(Code.UNAVAILABLE):  # without a certificate of its own
            Client(self.server.port, "boss-key", grpc.ssl_channel_credentials(read("ca.pem")))
        for key in (None, "wrong", "boss-ke", "boss-key2"):
            with self.refused(Code.UNAUTHENTICATED):
                connect(key)("Count", knowledge_base="kb")
            with self.refused(Code.UNAUTHENTICATED):
                connect(key).retrieve(dict(knowledge_base="kb", queries=[query(1)]))
        writer, reader, other = connect("writer-key"), connect("reader-key"), connect("other-key")
        self.assertEqual(reader("Count", knowledge_base="kb").entries, 10)
        with self.refused(Code.PERMISSION_DENIED, "reader", "write", "kb"):
            reader.put(dict(knowledge_base="kb"), [entry(50)])
        with self.refused(Code.PERMISSION_DENIED, "writer", "admin", "kb"):
            writer("DeleteKnowledgeBase", knowledge_base="kb")
        writer.put(dict(knowledge_base="kb"), [entry(50)])
        with self.refused(Code.PERMISSION_DENIED):
            writer("CreateSnapshot", name="s")
        with self.refused(Code.NOT_FOUND):  # another tenant's is not there
            other("Count", knowledge_base="kb")
        self.assertEqual(len(other("ListKnowledgeBases").knowledge_bases), 0)
        # Keys are read again: the reader's is gone, and only that.
        with open(self.path("keys.json")) as file:
            kept = [k for k in json.load(file)["keys"] if k["name"] != "reader"]
        with open(self.path("keys.json"), "w") as file:
            json.dump({"keys": kept}, file)
        self.server.process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + 20
        while True:
            try:
                reader("Count", knowledge_base="kb")
            except grpc.RpcError as error:
                self.assertEqual(error.code(), Code.UNAUTHENTICATED)
                break
            self.assertLess(time.monotonic(), deadline, "SIGHUP did nothing")
        self.assertEqual(boss("Count", knowledge_base="kb").entries, 11)

    def test_memories(self):
        client = Client(self.start().port)
        self.create_with(client, "kb", range(9))
        # Two documents that share a record: both are its sources, and it goes with the last.
        client.put(dict(knowledge_base="kb"), [entry(4, document="twin", ordinal=0, record=b"")])
        first = client("GetRecord", knowledge_base="kb", record_id=make_id(4), with_text=True)
        self.assertEqual([s.document_id for s in first[0].sources], ["doc-1", "twin"])
        self.assertEqual(first[0].sources[0].text, "text 4")
        self.assertEqual(b"".join(m.record_piece for m in first), make_record(4))
        page = client("ListDocuments", knowledge_base="kb", page_size=3)
        self.assertEqual([d.document_id for d in page.documents], ["doc-0", "doc-1", "doc-2"])
        self.assertEqual(page.documents[0].entries, 3)
        rest = client("ListDocuments", knowledge_base="kb", page_size=3, page_token=page.next_page_token)
        self.assertEqual([d.document_id for d in rest.documents], ["twin"])
        self.assertEqual(rest.next_page_token, "")
        with self.refused(Code.INVALID_ARGUMENT, "page_token"):
            client("ListDocuments", knowledge_base="kb", page_token="?!")
        with self.refused(Code.INVALID_ARGUMENT, "page_size", "1001"):
            client("ListDocuments", knowledge_base="kb", page_size=1001)

        def ids(**fields):
            (head, _), = client.retrieve(dict(knowledge_base="kb", queries=[query(4, top_k=9, **fields)]))
            self.assertEqual(head.error_code, 0, head.error_message)
            return {h.record_id for h in head.queries[0].hits}

        self.assertEqual(ids(), {make_id(n) for n in range(9)})
        self.assertEqual(ids(filter=dict(document_ids=["doc-2", "twin"])), {make_id(n) for n in (2, 4, 5, 8)})
        self.assertEqual(ids(filter=dict(metadata={"parity": "1"})), {make_id(n) for n in (1, 3, 5, 7)})
        self.assertEqual(ids(filter=dict(document_ids=["doc-0"], metadata={"parity": "1"})), {make_id(3)})
        self.assertEqual(ids(filter=dict(metadata={"parity": "7"})), set())
        self.assertEqual(ids(min_score=0.99), {make_id(4)})

        deleted = client("DeleteDocuments", knowledge_base="kb", document_ids=["doc-1", "absent"])
        self.assertEqual((deleted.deleted_entries, deleted.deleted_records), (3, 2))
        self.assertEqual(ids(), {make_id(n) for n in (0, 2, 3, 4, 5, 6, 8)})
        self.assertEqual(client("DeleteRecords", knowledge_base="kb",
                                record_ids=[make_id(4), make_id(77)]).deleted_entries, 1)
        with self.refused(Code.NOT_FOUND, make_id(4).hex()):
            client("GetRecord", knowledge_base="kb", record_id=make_id(4))
        count = client("Count", knowledge_base="kb")
        self.assertEqual((count.entries, count.records, count.documents), (6, 6, 2))

    def test_a_stream_remembers_what_its_client_holds(self):
        client = Client(self.start().port)
        self.create_with(client, "kb", range(9))
        ask = dict(knowledge_base="kb", queries=[query(4)])
        one, two, three, four = client.retrieve(
            dict(ask, request_id=7), ask, dict(ask, evicted=make_id(4)), dict(ask, with_records=False))
        self.assertEqual(one[0].request_id, 7)
        self.assertGreater(one[0].held_limit, 0)
        self.assertEqual(len(one[1]), 3)
        self.assertEqual(two[1], {})
        self.assertTrue(all(h.held for h in two[0].queries[0].hits))
        self.assertEqual(set(three[1]), {make_id(4)})
        self.assertEqual(four[1], {})
        (elsewhere, records), = client.retrieve(dict(ask, held=make_id(4)))  # another stream
        self.assertEqual(len(records), 2)
        past, after = client.retrieve(dict(ask, timeout=dict(seconds=-1)), ask)
        self.failed(past, Code.DEADLINE_EXCEEDED)
        self.assertEqual(after[0].error_code, 0)

    def test_aliases_versions_and_rollback(self):
        client = Client(self.start().port)
        self.create_with(client, "a", range(3))
        self.create_with(client, "b", range(3, 8))
        self.assertEqual(client("SetAlias", alias="live", knowledge_base="a").previous, "")
        self.assertEqual(client("Count", knowledge_base="live").entries, 3)
        self.assertEqual(client("SetAlias", alias="live", knowledge_base="b").previous, "a")
        self.assertEqual(client("Count", knowledge_base="live").entries, 5)
        self.assertEqual(dict(client("ListAliases").aliases), {"live": "b"})
        self.assertEqual(list(client("GetKnowledgeBase", knowledge_base="b").knowledge_base.aliases), ["live"])
        with self.refused(Code.ALREADY_EXISTS, "live"):
            client("CreateKnowledgeBase", spec=spec("live"))
        with self.refused(Code.ALREADY_EXISTS, "a"):
            client("CreateKnowledgeBase", spec=spec("a"))
        client("CreateKnowledgeBase", spec=spec("a"), if_not_exists=True)
        with self.refused(Code.INVALID_ARGUMENT, "live"):
            client("DeleteKnowledgeBase", knowledge_base="live")

        load = client("BeginLoad", knowledge_base="a", idempotency_key="r", mode="LOAD_MODE_REPLACE").load
        client.put(dict(load_id=load.load_id), [entry(20)], "PutLoad")
        with self.refused(Code.FAILED_PRECONDITION):  # live changes would be lost
            client.put(dict(knowledge_base="a"), [entry(30)])
        self.assertEqual(client("Count", knowledge_base="a").entries, 3)  # not yet
        client("CommitLoad", load_id=load.load_id, wait=True)
        self.assertEqual(client("Count", knowledge_base="a").entries, 1)
        versions = client("ListVersions", knowledge_base="a").versions
        self.assertEqual([(v.version, v.published, v.entries) for v in versions], [(1, False, 3), (2, True, 1)])
        (head, records), = client.retrieve(dict(knowledge_base="a", version=1, queries=[query(2)]))
        self.assertEqual(len(records), 3)
        self.assertEqual(client("Rollback", knowledge_base="a").version, 1)
        self.assertEqual(client("Count", knowledge_base="a").entries, 3)
        with self.refused(Code.FAILED_PRECONDITION, "1"):
            client("DropVersion", knowledge_base="a", version=1)
        client("DropVersion", knowledge_base="a", version=2)
        self.assertEqual([v.version for v in client("ListVersions", knowledge_base="a").versions], [1])
        with self.refused(Code.NOT_FOUND, "9"):
            client("Rollback", knowledge_base="a", version=9)
        client("DeleteAlias", alias="live")
        with self.refused(Code.NOT_FOUND, "live"):
            client("Count", knowledge_base="live")
        client("DeleteKnowledgeBase", knowledge_base="b")
        self.assertEqual([k.spec.name for k in client("ListKnowledgeBases").knowledge_bases], ["a"])

    def test_a_load_survives_both_sides(self):
        client = Client(self.start().port)
        client("CreateKnowledgeBase", spec=spec("kb"))
        begin = dict(knowledge_base="kb", idempotency_key="job", expected_entries=40)
        first = client("BeginLoad", **begin)
        self.assertFalse(first.resumed)
        load_id = first.load.load_id
        client.put(dict(load_id=load_id), [entry(n) for n in range(8)], "PutLoad")
        client.put(dict(load_id=load_id), [entry(n) for n in range(8, 15)], "PutLoad")
        load = client("GetLoad", load_id=load_id).load
        self.assertEqual((load.state, load.entries, load.bytes), (1, 15, 15 * len(make_record(0))))
        self.assertGreater(load.entries_per_second, 0)
        self.assertGreater(load.bytes_per_second, 0)
        self.assertTrue(load.HasField("time_left"))
        self.server.stop(signal.SIGKILL)

        client = Client(self.start().port)  # both are new; the key finds the load
        again = client("BeginLoad", **begin)
        self.assertTrue(again.resumed)
        self.assertEqual((again.load.load_id, again.load.entries), (load_id, 15))
        self.assertEqual(client("Count", knowledge_base="kb").entries, 0)
        held = client("ListLoadedDocuments", load_id=load_id, page_size=2)
        self.assertEqual([(d.document_id, d.entries) for d in held.documents], [("doc-0", 5), ("doc-1", 5)])
        # What was taken may be sent again: it counts once.
        client.put(dict(load_id=load_id), [entry(n) for n in range(10, 40)], "PutLoad")
        self.assertEqual(client("GetLoad", load_id=load_id).load.entries, 40)
        done = client("CommitLoad", load_id=load_id, wait=True).load
        self.assertEqual((done.state, done.version, done.indexing_fraction, done.failure), (3, 2, 1.0, ""))
        self.assertTrue(done.HasField("ended_at"))
        self.assertEqual(client("Count", knowledge_base="kb").entries, 40)
        self.assertEqual(client("CommitLoad", load_id=load_id).load.state, 3)  # harmless
        with self.refused(Code.FAILED_PRECONDITION, "load", load_id):
            client.put(dict(load_id=load_id), [entry(99)], "PutLoad")
        with self.refused(Code.FAILED_PRECONDITION, load_id):
            client("AbortLoad", load_id=load_id)

        other = client("BeginLoad", knowledge_base="kb", idempotency_key="other").load.load_id
        client.put(dict(load_id=other), [entry(60)], "PutLoad")
        self.assertEqual(client("AbortLoad", load_id=other).load.state, 4)
        self.assertEqual(client("Count", knowledge_base="kb").entries, 40)
        self.assertEqual([l.idempotency_key for l in client("ListLoads", knowledge_base="kb").loads], ["other", "job"])
        with self.refused(Code.NOT_FOUND, "load_id", "no-such"):
            client("GetLoad", load_id="no-such")

    def test_snapshots_and_backups(self):
        client = Client(self.start().port)
        self.create_with(client, "kb", range(200))
        snapshot = client("CreateSnapshot", name="before").snapshot
        manifests = [os.path.join(at, f) for at, _, files in os.walk(self.directory.name) for f in files
                     if f.lower().startswith("manifest") and "before" in at and "json" in f]
        self.assertEqual(len(manifests), 1, manifests)
        with open(manifests[0], "rb") as file:
            manifest = file.read()
        self.assertEqual(hashlib.sha256(manifest).digest(), snapshot.manifest_sha256)
        files = json.loads(manifest)["files"]
        self.assertGreater(len(files), 1)
        for name, file in files.items():
            with open(os.path.join(os.path.dirname(manifests[0]), name), "rb") as content:
                self.assertEqual(hashlib.sha256(content.read()).hexdigest(), file["sha256"], name)
        client.put(dict(knowledge_base="kb"), [entry(n) for n in range(200, 204)])
        self.assertEqual([s.name for s in client("ListSnapshots").snapshots], ["before"])
        client("RestoreSnapshot", name="before")
        self.assertEqual(client("Count", knowledge_base="kb").entries, 200)

        bulk = make_record(0, layers=500)  # so much that what else a backup copies does not matter
        client("CreateKnowledgeBase", spec=spec("bulk", geometry=dict(
            memory_layers=range(500), kv_heads=1, head_dim=HEAD_DIM, tokens_kept=1,
            reference_tokens=128)))
        client.put(dict(knowledge_base="bulk"), [entry(n, record=bulk) for n in range(1000, 1100)])
        full = client("CreateBackup", directory="nightly")
        self.assertGreater(full.bytes_copied, 100 * len(bulk))
        client.put(dict(knowledge_base="kb"), [entry(300)])
        second = client("CreateBackup", directory="nightly")
        self.assertEqual(second.backup_id, full.backup_id + 1)
        self.assertLess(second.bytes_copied, full.bytes_copied / 2)  # of what is new
        client("DeleteKnowledgeBase", knowledge_base="kb")
        client("RestoreBackup", directory="nightly", backup_id=full.backup_id)
        self.assertEqual(client("Count", knowledge_base="kb").entries, 200)
        client("RestoreBackup", directory="nightly")
        self.assertEqual(client("Count", knowledge_base="kb").entries, 201)
        (_, records), = client.retrieve(dict(knowledge_base="kb", queries=[query(300, top_k=1)]))
        self.assertEqual(records, {make_id(300): make_record(300)})

        # A file of a snapshot with one flipped bit: refused, the content stays.
        victim = os.path.join(os.path.dirname(manifests[0]),
                              next(name for name in files if name.endswith(".sst")))
        with open(victim, "r+b") as file:
            file.seek(100)
            byte = file.read(1)[0]
            file.seek(100)
            file.write(bytes([byte ^ 1]))
        with self.refused(Code.DATA_LOSS, os.path.basename(victim)):
            client("RestoreSnapshot", name="before")
        self.assertEqual(client("Count", knowledge_base="kb").entries, 201)
        client("DeleteSnapshot", name="before")
        with self.refused(Code.NOT_FOUND, "before"):
            client("RestoreSnapshot", name="before")

    def test_bad_input_names_field_and_value(self):
        client = Client(self.start("--max_message_mb", "1").port)
        self.create_with(client, "kb", range(3))
        bad = Code.INVALID_ARGUMENT
        flipped = bytearray(make_record(5))
        flipped[140] ^= 1
        nan = make_vector(5)
        nan[3] = float("nan")
        for code, parts, new in [
            (bad, ["embedding", "15", "16"], entry(5, embedding=make_vector(5)[1:])),
            (bad, ["embedding"], entry(5, embedding=nan)),
            (bad, ["record"], entry(5, record=bytes(flipped))),
            (bad, ["record"], entry(5, record=make_record(5)[:-1])),
            (Code.FAILED_PRECONDITION, ["fingerprint"], entry(5, record=make_record(5, fingerprint=EMBEDDER))),
            (Code.FAILED_PRECONDITION, ["layers"], entry(5, record=make_record(5, layers=3))),
            (bad, ["record_id", "31"], entry(5, record_id=make_id(5)[1:])),
            (bad, ["document_id"], entry(5, document="x" * 513)),
            (Code.NOT_FOUND, [make_id(5).hex()], entry(5, record=b"")),
        ]:
            with self.subTest(parts=parts), self.refused(code, "doc", *parts):
                client.put(dict(knowledge_base="kb"), [entry(4), new])
        with self.refused(Code.RESOURCE_EXHAUSTED, str(2 ** 20)):
            client.put(dict(knowledge_base="kb"), [entry(5, record=bytes(2 ** 20))])
        self.assertEqual(client("Count", knowledge_base="kb").entries, 3)
        with self.refused(Code.NOT_FOUND, "nowhere"):
            client.put(dict(knowledge_base="nowhere"), [entry(5)])
        with self.refused(bad, "header"):
            client.put(None, [entry(5)])

        for name in ("../up", "a/b", "", ".", "..", "a\0b", "x" * 129, "-a", "a b"):
            with self.subTest(name=name):
                with self.refused(bad, "name"):
                    client("CreateKnowledgeBase", spec=spec(name))
                with self.refused(bad):
                    client("SetAlias", alias=name, knowledge_base="kb")
                if name:  # none: made from the time
                    with self.refused(bad):
                        client("CreateSnapshot", name=name)
        for directory in ("../up", "/etc", "a/../../b", ""):
            with self.subTest(directory=directory), self.refused(bad, "directory"):
                client("CreateBackup", directory=directory)
        for field, value in [("embedding_dimension", 0), ("embedding_dimension", 65537),
                             ("writer_fingerprint", b"short"), ("codec", "CODEC_UNSPECIFIED")]:
            with self.subTest(field=field), self.refused(bad, field):
                client("CreateKnowledgeBase", spec=spec("new", **{field: value}))

        ask = lambda **fields: dict(knowledge_base="kb", queries=[query(1, **fields)])
        answers = client.retrieve(
            ask(top_k=0), ask(top_k=1001), ask(embedding=[1.0]), ask(embedding=nan),
            dict(ask(), knowledge_base="nowhere"), dict(ask(), version=9), dict(ask(), evicted=b"x"),
            dict(knowledge_base="kb", queries=[query(1)] * 1025), ask())
        for answer, (code, parts) in zip(answers, [
            (bad, ["top_k", "0"]), (bad, ["top_k", "1001"]), (bad, ["embedding", "1", "16"]),
            (bad, ["embedding"]), (Code.NOT_FOUND, ["nowhere"]), (Code.NOT_FOUND, ["9"]),
            (bad, ["evicted"]), (Code.RESOURCE_EXHAUSTED, ["1025"])]):
            with self.subTest(parts=parts):
                self.failed(answer, code, *parts)
        self.assertEqual(len(answers), 9)
        self.assertEqual(answers[-1][0].error_code, 0)

    def test_health_metrics_and_drain(self):
        server = self.start()
        client = Client(server.port)
        self.create_with(client, "kb", range(3))
        health = health_pb2_grpc.HealthStub(client.channel)
        for service in ("", SERVICE):
            self.assertEqual(health.Check(health_pb2.HealthCheckRequest(service=service)).status,
                             health_pb2.HealthCheckResponse.SERVING)
        status = client("GetStatus")
        self.assertEqual((status.knowledge_bases, status.entries, status.writable), (1, 3, True))
        client.retrieve(dict(knowledge_base="kb", queries=[query(1)]))
        url = f"http://127.0.0.1:{server.metrics_port}/metrics"
        metrics = urllib.request.urlopen(url, timeout=10).read().decode()
        for name in ("memory3_entries 3", "memory3_writable 1", "memory3_retrieve_queries_total 1",
                     'memory3_memory_requests_total{code="OK",method="Put"} 1'):
            self.assertIn(name, metrics)
        # An open stream and an unfinished one do not keep it from ending.
        call, request = client.method("Retrieve")
        waiting = call(iter([request(knowledge_base="kb", queries=[query(1)])]), timeout=30)
        next(waiting)
        self.assertEqual(server.stop(), 0, server.log)
        with self.refused(Code.UNAVAILABLE):
            client("Count", knowledge_base="kb")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    BINARY = os.path.abspath(sys.argv.pop(1))
    unittest.main()
