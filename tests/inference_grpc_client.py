"""The inference server as Python's grpcio sees it, with messages that the server itself describes
(reflection), no generated code of ours: inference_http_test starts it.

usage: inference_grpc_client.py HOST:PORT API_KEY
The server: model stories260K, knowledge base `harbour`.
"""
import sys

import grpc
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

target, key = sys.argv[1], sys.argv[2]
channel = grpc.insecure_channel(target)
database = ProtoReflectionDescriptorDatabase(channel)
assert "memory3.v1.InferenceService" in database.get_services()
service = descriptor_pool.DescriptorPool(database).FindServiceByName("memory3.v1.InferenceService")


def new(kind, **fields):
    return message_factory.GetMessageClass(kind)(**fields)


def call(name, key=key, **fields):
    """The answer, or the list of a stream's."""
    method = service.methods_by_name[name]
    stub = channel.unary_stream if name == "Generate" else channel.unary_unary
    answer = stub(f"/{service.full_name}/{name}",
                  request_serializer=lambda message: message.SerializeToString(),
                  response_deserializer=message_factory.GetMessageClass(method.output_type).FromString)(
        new(method.input_type, **fields), timeout=60, metadata=[("authorization", f"Bearer {key}")])
    return list(answer) if name == "Generate" else answer


def expect(code, words, name, **fields):
    try:
        call(name, **fields)
    except grpc.RpcError as error:
        assert error.code() == code and words in error.details(), (error.code(), error.details())
        return
    raise AssertionError(f"{name} {fields}: no {code}")


model = call("GetModel")
assert model.name == "stories260K" and model.chunk_tokens == 64, model
assert list(model.knowledge_bases) == ["harbour"], model

text = "Lily had a red boat."
split = call("Tokenize", text=text)
assert len(split.ids) == len(split.pieces) > 4, split
assert call("Detokenize", ids=split.ids).text.strip() == text, split

request = dict(text="Lily had a red boat", memory=dict(knowledge_base="harbour", references_per_chunk=3),
               stopping=dict(max_new_tokens=70, ignore_eos=True))
events = call("Generate", **request)
kinds = [event.WhichOneof("event") for event in events]
assert kinds[0] == "prompt" and kinds[-1] == "finish", kinds
tokens = [i for event in events for i in event.delta.token_ids]
assert len(tokens) == 70, len(tokens)
chunks = [event.provenance for event in events if event.HasField("provenance")]
assert [c.chunk for c in chunks] == [0, 1, 2] and chunks[1].inherited, chunks
assert chunks[0].memories[0].sources[0].document_id == "story-0", chunks[0]
assert len(chunks[2].memories) == 3 and not chunks[2].timed_out, chunks[2]
finish = events[-1].finish
assert finish.usage.retrievals == 2 and finish.timings.total.nanos > 0, finish

whole = call("GenerateUnary", **request)
assert whole.text == "".join(event.delta.text for event in events)
assert list(whole.token_ids) == tokens

# What was generated greedily is what a greedy reader expects, with the same memories only.
scored = dict(text=request["text"], continuation_ids=dict(ids=tokens))
with_memory = call("Score", memory=request["memory"], **scored)
assert with_memory.greedy and len(with_memory.token_logprobs) == 70, with_memory
without = call("Score", **scored)
assert without.log_likelihood < with_memory.log_likelihood, (without, with_memory)

invalid = grpc.StatusCode.INVALID_ARGUMENT
expect(invalid, "temperature", "Generate", text="a", sampling=dict(temperature=float("nan")))
expect(invalid, "prompt", "Generate", text="")
expect(grpc.StatusCode.NOT_FOUND, "nowhere", "Generate", text="a", memory=dict(knowledge_base="nowhere"))
expect(grpc.StatusCode.NOT_FOUND, "request_id", "Abort", request_id="nobody")
expect(grpc.StatusCode.UNAUTHENTICATED, "", "GetModel", key="wrong")
print("ok")
