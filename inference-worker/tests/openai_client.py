"""Tests a worker with OpenAI's Python client: `python openai_client.py http://HOST:PORT`."""

import sys

import openai

client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", max_retries=0)
question = [{"role": "user", "content": "What is gravity? Answer in one sentence."}]

models = client.models.list()
assert [m.id for m in models] == ["smol"], models
assert client.models.retrieve("smol").id == "smol"

chat = client.chat.completions.create(model="smol", messages=question, temperature=0, max_tokens=40)
answer = chat.choices[0].message.content
assert answer.startswith("Gravity is"), answer
assert chat.choices[0].finish_reason == "stop" and chat.usage.completion_tokens == 32, chat
assert chat.object == "chat.completion" and chat.id.startswith("chatcmpl-") and chat._request_id

text, usage, finish = "", None, None
for chunk in client.chat.completions.create(
    model="smol", messages=question, temperature=0, max_tokens=40, stream=True, stream_options={"include_usage": True}
):
    for choice in chunk.choices:
        text += choice.delta.content or ""
        finish = choice.finish_reason or finish
    usage = chunk.usage or usage
assert (text, finish, usage.completion_tokens) == (answer, "stop", 32), (text, finish, usage)
assert usage.prompt_tokens_details.cached_tokens == 32, usage  # the full blocks of the prompt, from the earlier request

with_logprobs = client.chat.completions.create(
    model="smol", messages=question, temperature=0, max_tokens=3, logprobs=True, top_logprobs=2, n=2, seed=1
)
assert len(with_logprobs.choices) == 2
content = with_logprobs.choices[0].logprobs.content
assert len(content) == 3 and len(content[0].top_logprobs) == 2, content
assert content[0].token == content[0].top_logprobs[0].token and content[0].logprob <= 0
assert bytes(content[0].bytes).decode() == content[0].token

completion = client.completions.create(model="smol", prompt="The capital of France is", max_tokens=2, temperature=0, logprobs=3)
assert completion.choices[0].text == " Paris.", completion
assert completion.choices[0].logprobs.tokens == [" Paris", "."], completion
pieces = client.completions.create(model="smol", prompt="The capital of France is", max_tokens=2, temperature=0, stream=True)
assert "".join(c.choices[0].text for c in pieces) == " Paris."
stopped = client.completions.create(model="smol", prompt="The capital of France is", max_tokens=9, temperature=0, stop=["."])
assert stopped.choices[0].text == " Paris" and stopped.choices[0].finish_reason == "stop", stopped

vectors = client.embeddings.create(model="smol", input=["a cat", "a kitten", "the stock market fell"])
assert len(vectors.data) == 3 and len(vectors.data[0].embedding) == 576


def similar(a, b):
    return sum(x * y for x, y in zip(vectors.data[a].embedding, vectors.data[b].embedding))


assert abs(similar(0, 0) - 1) < 1e-4 and similar(0, 1) > similar(0, 2)


def rejected(kind, **arguments):
    try:
        client.chat.completions.create(**{"model": "smol", "messages": question, **arguments})
    except kind as error:
        return error
    raise AssertionError(f"{arguments} was not rejected")


assert rejected(openai.NotFoundError, model="gpt-9").code == "model_not_found"
assert rejected(openai.BadRequestError, max_tokens=99999).code == "context_length_exceeded"
assert rejected(openai.BadRequestError, temperature=9).param == "temperature"
assert rejected(openai.BadRequestError, messages=[]).param == "messages"

# A client may disconnect in the middle of a stream.
stream = client.chat.completions.create(model="smol", messages=question, max_tokens=500, stream=True, extra_body={"ignore_eos": True})
next(iter(stream))
stream.close()
print("all checks passed")
