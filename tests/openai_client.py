"""OpenAI's own Python client against the real server: inference_http_test starts it.

usage: openai_client.py URL API_KEY
The server: model stories260K, knowledge base `harbour`, one running and two waiting requests.
"""
import sys
import threading

import openai

MODEL = "stories260K"
url, key = sys.argv[1], sys.argv[2]
client = openai.OpenAI(base_url=url + "/v1", api_key=key, max_retries=0, timeout=60)
GREEDY = dict(model=MODEL, temperature=0)


def expect_error(kind, call, param=None, code=None):
    try:
        call()
    except kind as error:
        assert param is None or error.param == param, (error.param, param)
        assert code is None or error.code == code, (error.code, code)
        return error
    raise AssertionError(f"no {kind.__name__}")


def models():
    names = [model.id for model in client.models.list()]
    assert names == [MODEL, MODEL + "@harbour"], names
    assert client.models.retrieve(MODEL).owned_by == "memory3"
    expect_error(openai.NotFoundError, lambda: client.models.retrieve("gpt-9"), code="model_not_found")


def completions():
    answer = client.completions.create(prompt="Once upon a time", max_tokens=20, **GREEDY)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    choice = answer.choices[0]
    assert choice.text and choice.finish_reason == "length" and choice.logprobs is None
    assert answer.usage.completion_tokens == 20
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 20
    # Sixteen tokens where nothing is said, as OpenAI has it.
    assert client.completions.create(prompt="Once", **GREEDY).usage.completion_tokens == 16
    parts = list(client.completions.create(
        prompt="Once upon a time", max_tokens=20, stream=True,
        stream_options={"include_usage": True}, **GREEDY))
    assert "".join(part.choices[0].text for part in parts if part.choices) == choice.text
    assert parts[-1].usage == answer.usage, (parts[-1].usage, answer.usage)
    both = client.completions.create(prompt=["Once upon a time", "A dog"], max_tokens=20, **GREEDY)
    assert [c.index for c in both.choices] == [0, 1] and both.choices[0].text == choice.text
    echoed = client.completions.create(prompt="Once upon a time", max_tokens=20, echo=True, **GREEDY)
    assert echoed.choices[0].text == "Once upon a time" + choice.text, echoed.choices[0].text
    word = choice.text.split()[3]
    stopped = client.completions.create(prompt="Once upon a time", max_tokens=20, stop=[word], **GREEDY)
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].text == choice.text[:choice.text.index(word)]


def sampling():
    def sample(**options):
        return client.completions.create(model=MODEL, prompt="One day", max_tokens=30, **options).choices[0].text
    assert sample(seed=3) == sample(seed=3)
    assert len({sample() for _ in range(4)}) > 1, "without a seed every answer is another"
    assert sample(temperature=0, logit_bias={"13": -100}) is not None
    assert sample(temperature=0) != sample(temperature=0, frequency_penalty=2, presence_penalty=2)
    assert sample(temperature=1, extra_body={"top_k": 1}) == sample(temperature=0)


def logprobs():
    answer = client.completions.create(prompt="Once upon a time", max_tokens=5, logprobs=3, **GREEDY)
    found = answer.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset) == 5
    assert "".join(found.tokens) == answer.choices[0].text, (found.tokens, answer.choices[0].text)
    assert found.text_offset[1] == len(found.tokens[0])
    assert all(3 <= len(top) <= 4 for top in found.top_logprobs)
    # Greedy: what was chosen is the likeliest.
    assert all(max(top.values()) == own for top, own in zip(found.top_logprobs, found.token_logprobs))
    chat = client.chat.completions.create(
        messages=[{"role": "user", "content": "Hi"}], max_tokens=4, logprobs=True, top_logprobs=2, **GREEDY)
    tokens = chat.choices[0].logprobs.content
    assert len(tokens) == 4 and all(len(token.top_logprobs) == 2 for token in tokens)
    assert "".join(token.token for token in tokens) == chat.choices[0].message.content


def chat():
    messages = [{"role": "system", "content": "Tell a story."}, {"role": "user", "content": "Of a cat."}]
    answer = client.chat.completions.create(messages=messages, max_completion_tokens=24, **GREEDY)
    message = answer.choices[0].message
    assert answer.object == "chat.completion" and message.role == "assistant" and message.content
    with client.chat.completions.create(
            messages=messages, max_completion_tokens=24, stream=True,
            stream_options={"include_usage": True}, **GREEDY) as stream:
        parts = list(stream)
    assert parts[0].choices[0].delta.role == "assistant"
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == message.content
    assert parts[-2].choices[0].finish_reason == answer.choices[0].finish_reason
    assert parts[-1].usage.completion_tokens == answer.usage.completion_tokens


def memory():
    body = {"memory": {"knowledge_base": "harbour", "references_per_chunk": 2, "with_text": True}}
    prompt = "Lily had a red boat"
    answer = client.completions.create(prompt=prompt, max_tokens=8, extra_body=body, **GREEDY)
    read = answer.memory["chunks"][0]["memories"]
    assert len(read) == 2 and read[0]["sources"][0]["uri"] == "https://example.org/stories/0", read
    assert "red ball" in read[0]["sources"][0]["text"]
    parts = client.completions.create(prompt=prompt, max_tokens=8, stream=True, extra_body=body, **GREEDY)
    chunks = [chunk for part in parts for chunk in (getattr(part, "memory", None) or {}).get("chunks", [])]
    assert [chunk["chunk"] for chunk in chunks] == [0, 1], chunks
    named = client.completions.create(
        model=MODEL + "@harbour", prompt=prompt, max_tokens=8, temperature=0,
        extra_body={"memory": {"references_per_chunk": 2}})
    assert named.choices[0].text == answer.choices[0].text
    expect_error(openai.NotFoundError, lambda: client.completions.create(
        prompt="a", extra_body={"memory": {"knowledge_base": "nowhere"}}, **GREEDY))
    only = {"memory": {"knowledge_base": "harbour", "filter": {"document_ids": ["story-3"]}}}
    answer = client.completions.create(prompt=prompt, max_tokens=4, extra_body=only, **GREEDY)
    assert {m["sources"][0]["document_id"] for m in answer.memory["chunks"][0]["memories"]} <= {"story-3"}


def errors():
    def create(**options):
        return lambda: client.completions.create(**{"model": MODEL, "prompt": "a", **options})
    bad = openai.BadRequestError
    error = expect_error(bad, create(temperature=3), param="temperature")
    assert error.status_code == 400 and error.type == "invalid_request_error"
    expect_error(bad, create(n=2), param="n")
    expect_error(bad, create(max_tokens=0), param="max_tokens")
    expect_error(bad, create(prompt=""), param="prompt")
    expect_error(bad, create(prompt=[5] * 600), param="prompt")
    expect_error(bad, create(extra_body={"memroy": {}}), param="memroy")
    expect_error(bad, create(extra_body={"memory": {"policy": "soon"}}), param="memory.policy")
    expect_error(openai.NotFoundError, create(model="gpt-9"), param="model", code="model_not_found")
    # Also where a stream was asked for.
    expect_error(bad, create(stream=True, top_p=0), param="top_p")
    stranger = openai.OpenAI(base_url=url + "/v1", api_key="wrong", max_retries=0)
    expect_error(openai.AuthenticationError, lambda: stranger.models.list(), code="invalid_api_key")
    expect_error(openai.AuthenticationError, lambda: stranger.completions.create(model=MODEL, prompt="a"),
                 code="invalid_api_key")


def limits():
    """One runs, two wait, more are told to come again; and those that come again are served."""
    results = []

    def ask(retries):
        try:
            patient = client.with_options(max_retries=retries)
            answer = patient.completions.create(
                prompt="Once", max_tokens=400, extra_body={"ignore_eos": True}, **GREEDY)
            results.append(answer.usage.completion_tokens)
        except openai.RateLimitError as error:
            assert int(error.response.headers["retry-after"]) >= 1
            assert int(error.response.headers["retry-after-ms"]) >= 1
            results.append("refused")

    def at_once(count, retries):
        results.clear()
        threads = [threading.Thread(target=ask, args=(retries,)) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return list(results)

    refused = at_once(12, retries=0)
    assert "refused" in refused and 400 in refused, refused
    assert at_once(4, retries=20) == [400] * 4


for check in (models, completions, sampling, logprobs, chat, memory, errors, limits):
    check()
    print("ok", check.__name__)
