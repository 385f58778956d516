// Talks to a running `nibble serve` with OpenAI's own Node SDK (pinned in package.json).
//   cp -r tests/clients /tmp/clients && cd /tmp/clients && npm install
//   node openai_node.mjs http://127.0.0.1:8000/v1 [KEY]
// SPDX-License-Identifier: Apache-2.0
import OpenAI from "openai";

const [url, key = "none"] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url, apiKey: key, maxRetries: 0 });
const messages = [{ role: "user", content: "What is water?" }];

function check(condition, what) {
  if (!condition) {
    console.error(`FAILED: ${what}`);
    process.exit(1);
  }
  console.log(`ok: ${what}`);
}

const model = (await client.models.list()).data[0].id;
const whole = await client.chat.completions.create({ model, messages, max_tokens: 20, temperature: 0 });
check(whole.choices[0].message.content, "a chat completion");

const chunks = [];
const stream = await client.chat.completions.create({
  model, messages, max_tokens: 20, temperature: 0, stream: true, stream_options: { include_usage: true },
});
for await (const chunk of stream) chunks.push(chunk);
const text = chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join("");
check(text === whole.choices[0].message.content, "the stream says the same");
check(chunks.at(-1).usage.completion_tokens === whole.usage.completion_tokens, "usage comes last");

const runner = client.chat.completions.stream({ model, messages, max_tokens: 20, temperature: 0 });
check((await runner.finalContent()) === text, "the SDK's stream helper");

const old = await client.completions.create({ model, prompt: "The sea", max_tokens: 5, temperature: 0 });
check(old.choices[0].text.length > 0, "a text completion");

try {
  await client.chat.completions.create({ model, messages, max_tokens: 10_000_000 });
  check(false, "too many tokens must be refused");
} catch (error) {
  check(error instanceof OpenAI.BadRequestError && error.code === "context_length_exceeded", "context overflow");
}

const abort = new AbortController();
const left = await client.chat.completions.create(
  { model, messages, max_tokens: 150, stream: true, ignore_eos: true }, { signal: abort.signal });
for await (const chunk of left) {
  if (chunk.choices[0]?.delta.content) break;
}
abort.abort();
await new Promise((resolve) => setTimeout(resolve, 300));
const metrics = await (await fetch(url.replace(/\/v1$/, "/metrics"))).text();
check(/^vllm:kv_cache_usage_perc.* 0$/m.test(metrics), "leaving frees the KV cache");
