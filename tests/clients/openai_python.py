#!/usr/bin/env python3
"""Talks to a running `nibble serve` with OpenAI's own Python SDK (pinned in requirements.txt).

    python3 -m venv /tmp/venv && /tmp/venv/bin/pip install -r tests/clients/requirements.txt
    /tmp/venv/bin/python tests/clients/openai_python.py http://127.0.0.1:8000/v1 [KEY]
"""
import json
import sys
import time
import typing

import openai
import pydantic

client = openai.OpenAI(base_url=sys.argv[1], api_key=sys.argv[2] if len(sys.argv) > 2 else "none", max_retries=0)
model = client.models.list().data[0].id
question = [{"role": "user", "content": "What is water?"}]


def check(condition, what):
    if not condition:
        sys.exit(f"FAILED: {what}")
    print(f"ok: {what}")


whole = client.chat.completions.create(model=model, messages=question, max_tokens=20, temperature=0, logprobs=True, top_logprobs=2)
check(whole.choices[0].message.content and whole.choices[0].message.role == "assistant", "a chat completion")
check(whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens, "usage adds up")
check(len(whole.choices[0].logprobs.content[0].top_logprobs) == 2, "log-probs")

chunks = list(client.chat.completions.create(model=model, messages=question, max_tokens=20, temperature=0, stream=True,
                                             stream_options={"include_usage": True}))
text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
check(text == whole.choices[0].message.content, "the stream says the same")
check(chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == "", "the role comes first")
check(chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens, "usage comes last")
check(chunks[-1].usage.prompt_tokens_details.cached_tokens > 0, "the prompt was cached")

several = client.chat.completions.create(model=model, messages=question, n=3, seed=1, max_tokens=8)
check([c.index for c in several.choices] == [0, 1, 2], "three choices")

stopped = client.chat.completions.create(model=model, messages=question, max_tokens=50, temperature=0, stop=[text[5:9]])
check(stopped.choices[0].finish_reason == "stop" and text[5:9] not in stopped.choices[0].message.content, "stop strings")

prefilled = client.chat.completions.create(
    model=model, messages=question + [{"role": "assistant", "content": "Water is"}], max_tokens=8, temperature=0,
    extra_body={"continue_final_message": True, "add_generation_prompt": False, "unknown_field": {"is": "ignored"}})
check(not prefilled.choices[0].message.content.startswith("Water is"), "continue_final_message")

look_up = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {"word": {"type": "string"}}}}}
forced = dict(model=model, messages=question, tools=[look_up], tool_choice={"type": "function", "function": {"name": "look_up"}},
              max_tokens=12, temperature=0)
call = client.chat.completions.create(**forced).choices[0].message.tool_calls[0]
check(call.function.name == "look_up" and len(call.id) == 9, "a tool call")
with client.chat.completions.stream(**forced) as stream:
    for _ in stream:
        pass
    again = stream.current_completion_snapshot.choices[0].message.tool_calls[0]
check(again.function.arguments == call.function.arguments and again.function.name == "look_up", "the SDK puts a streamed call together")
after = client.chat.completions.create(model=model, max_tokens=8, tools=[look_up], messages=question + [
    {"role": "assistant", "content": None, "tool_calls": [{"id": "call_of_another_server", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "water"}'}}]},
    {"role": "tool", "tool_call_id": "call_of_another_server", "content": "wet"}])
check(after.choices[0].message.content is not None, "a tool's result")

class Animal(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=8)
    kind: typing.Literal["cat", "dog"]
    age: int = pydantic.Field(ge=0, le=30)
    tame: typing.Optional[bool]


parse = client.chat.completions.parse if hasattr(client.chat.completions, "parse") else client.beta.chat.completions.parse
for seed in range(3):
    parsed = parse(model=model, messages=question, response_format=Animal, temperature=0.8, seed=seed, max_tokens=140)
    check(isinstance(parsed.choices[0].message.parsed, Animal) and parsed.choices[0].finish_reason == "stop", "parse() into a pydantic model")
thing = client.chat.completions.create(model=model, messages=question, response_format={"type": "json_object"}, temperature=0, max_tokens=140)
check(thing.choices[0].finish_reason == "length" or isinstance(json.loads(thing.choices[0].message.content), dict), "a JSON object")
chosen = client.chat.completions.create(model=model, messages=question, max_tokens=20, extra_body={"guided_choice": ["wet", "dry"]})
check(chosen.choices[0].message.content in ("wet", "dry"), "guided_choice")
matched = client.completions.create(model=model, prompt="The year", max_tokens=20, extra_body={"structured_outputs": {"regex": "[12][0-9]{3}"}})
check(len(matched.choices[0].text) == 4 and matched.choices[0].text.isdigit(), "structured_outputs with a regex")
try:
    client.chat.completions.create(model=model, messages=question, response_format={
        "type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object", "minProperties": 1}}})
    check(False, "a keyword that is not honoured must be refused")
except openai.BadRequestError as error:
    check(error.code == "unsupported_value" and "minProperties" in error.message, "a keyword that is not honoured")

old = client.completions.create(model=model, prompt="The sea", max_tokens=6, temperature=0, logprobs=1, echo=True)
check(old.choices[0].text.startswith("The sea") and old.choices[0].logprobs.tokens, "a text completion with echo")
streamed = "".join(c.choices[0].text for c in client.completions.create(model=model, prompt="The sea", max_tokens=6, temperature=0, stream=True))
check(old.choices[0].text == "The sea" + streamed, "a streamed text completion")

try:
    client.chat.completions.create(model=model, messages=question, max_tokens=10_000_000)
    check(False, "too many tokens must be refused")
except openai.BadRequestError as error:
    check(error.code == "context_length_exceeded" and "maximum context length is" in error.message, "context overflow")
try:
    client.chat.completions.create(model="no-such-model", messages=question)
    check(False, "an unknown model must be refused")
except openai.NotFoundError as error:
    check(error.code == "model_not_found", "an unknown model")

stream = client.chat.completions.create(model=model, messages=question, max_tokens=150, stream=True, extra_body={"ignore_eos": True})
next(iter(stream))
stream.close()  # leaves in mid-answer
time.sleep(0.3)
metrics = client._client.get(sys.argv[1].removesuffix("/v1") + "/metrics").text
used = [line for line in metrics.splitlines() if line.startswith("vllm:kv_cache_usage_perc")][0]
check(float(used.split()[-1]) == 0, "leaving frees the KV cache")
