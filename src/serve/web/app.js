// The chat page. No framework, nothing from elsewhere; text only ever becomes text nodes.
// SPDX-License-Identifier: Apache-2.0
"use strict";

const $ = (id) => document.getElementById(id);
const kNumbers = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];
const kSettings = [...kNumbers, "system", "key"];

let messages = []; // {role, content, stats}
let abort = null; // AbortController of the answer in the making
let editing = -1; // index of the message in an edit box

// ---- Storage: the chat and the settings survive a reload; the key only as long as the tab.

function load(store, name, fallback) {
  try {
    return JSON.parse(store.getItem("nibble." + name)) ?? fallback;
  } catch {
    return fallback;
  }
}

function save() {
  try {
    localStorage.setItem("nibble.messages", JSON.stringify(messages));
    const settings = {};
    for (const name of kSettings) if (name !== "key") settings[name] = $(name).value;
    localStorage.setItem("nibble.settings", JSON.stringify(settings));
    sessionStorage.setItem("nibble.key", JSON.stringify($("key").value));
  } catch {
    // Storage may be full or forbidden; the page works without it.
  }
}

// ---- Rendering

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick") node.addEventListener("click", value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

/// `code` and **bold** inside a paragraph.
function inline(text) {
  const parts = [];
  for (const piece of text.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/)) {
    if (/^`.+`$/.test(piece)) parts.push(element("code", {}, piece.slice(1, -1)));
    else if (/^\*\*.+\*\*$/.test(piece)) parts.push(element("strong", {}, piece.slice(2, -2)));
    else if (piece) parts.push(piece);
  }
  return parts;
}

/// Paragraphs and fenced code; a fence that is still open counts as closed at the end.
function rich(text) {
  const out = [];
  text.split(/^```[^\n]*\n?/m).forEach((block, idx) => {
    if (idx % 2) {
      out.push(element("pre", {}, element("code", {}, block.replace(/\n$/, ""))));
      return;
    }
    for (const paragraph of block.split(/\n{2,}/)) {
      if (paragraph.trim()) out.push(element("p", {}, ...inline(paragraph.trim())));
    }
  });
  return out;
}

/// What a message says, after what was thought for it (open while nothing else has been said).
function spoken(message) {
  const said = rich(message.content);
  if (!message.reasoning) return said;
  const thought = element("details", {}, element("summary", {}, "Reasoning"), ...rich(message.reasoning));
  thought.open = !message.content;
  return [thought, ...said];
}

function describe(stats) {
  if (!stats) return "";
  const parts = [`${stats.tokens} tokens`];
  if (stats.rate) parts.push(`${stats.rate.toFixed(1)} tokens/s`);
  if (stats.first !== undefined) parts.push(`first after ${Math.round(stats.first)} ms`);
  parts.push(`${stats.cached} of ${stats.prompt} prompt tokens cached`);
  if (stats.finish === "length") parts.push("length limit");
  if (stats.finish === "stopped") parts.push("stopped");
  return parts.join(" · ");
}

function under(idx) {
  const message = messages[idx];
  const last = idx === messages.length - 1;
  const bar = element("div", { class: "under" });
  const add = (label, action, title) =>
    bar.append(element("button", { type: "button", onclick: action, title }, label));
  if (!abort) {
    add("Edit", () => edit(idx), "Change this message");
    add("Copy", () => navigator.clipboard?.writeText(message.content), "Copy the text");
    if (message.role === "assistant" && last) {
      add("Regenerate", regenerate, "Answer again (Alt+R)");
      add("Continue", continueAnswer, "Go on where it ends (Alt+C)");
    }
  }
  if (message.role === "assistant") bar.append(element("span", { class: "stats" }, describe(message.stats)));
  return bar;
}

function editBox(idx) {
  const box = element("textarea", { rows: "4", "aria-label": "Edit message" });
  box.value = messages[idx].content;
  const accept = () => {
    messages[idx].content = box.value;
    delete messages[idx].stats;
    editing = -1;
    if (messages[idx].role === "user") {
      messages.length = idx + 1;
      answer(false);
    } else {
      show();
    }
  };
  const cancel = () => {
    editing = -1;
    show();
  };
  box.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      accept();
    } else if (event.key === "Escape") {
      event.stopPropagation();
      cancel();
    }
  });
  const bar = element("div", { class: "under" },
    element("button", { type: "button", onclick: accept }, messages[idx].role === "user" ? "Send again" : "Save"),
    element("button", { type: "button", onclick: cancel }, "Cancel"));
  queueMicrotask(() => box.focus());
  return [box, bar];
}

function show() {
  const list = $("chat");
  const main = document.querySelector("main");
  const atEnd = main.scrollHeight - main.scrollTop - main.clientHeight < 60;
  list.replaceChildren(...messages.map((message, idx) => {
    const item = element("li", { class: message.role });
    if (editing === idx) item.append(...editBox(idx));
    else item.append(element("div", { class: "said" }, ...spoken(message)), under(idx));
    return item;
  }));
  if (abort && list.lastChild) list.lastChild.firstChild.classList.add("waiting");
  $("empty").hidden = messages.length > 0;
  $("send").hidden = !!abort;
  $("stop").hidden = !abort;
  if (atEnd) main.scrollTop = main.scrollHeight;
  save();
}

/// While an answer grows only its own text is drawn again, once per frame.
let drawing = false;
function grow() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    const said = $("chat").lastElementChild?.querySelector(".said");
    if (!said || !abort) return;
    const main = document.querySelector("main");
    const atEnd = main.scrollHeight - main.scrollTop - main.clientHeight < 60;
    said.replaceChildren(...spoken(messages[messages.length - 1]));
    if (atEnd) main.scrollTop = main.scrollHeight;
  });
}

function complain(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

// ---- Talking to the server

function headers() {
  const out = { "Content-Type": "application/json" };
  if ($("key").value) out.Authorization = "Bearer " + $("key").value;
  return out;
}

async function errorOf(reply) {
  try {
    return (await reply.json()).error.message;
  } catch {
    return `The server answered ${reply.status}`;
  }
}

async function* events(body) {
  const decoder = new TextDecoder();
  let pending = "";
  for (const reader = body.getReader(); ;) {
    const { value, done } = await reader.read();
    if (done) return;
    pending += decoder.decode(value, { stream: true });
    const whole = pending.split("\n\n");
    pending = whole.pop();
    for (const event of whole) {
      if (event.startsWith("data: ") && event !== "data: [DONE]") yield JSON.parse(event.slice(6));
    }
  }
}

function requestBody(goOn) {
  const body = {
    messages: messages.map(({ role, content }) => ({ role, content })),
    stream: true,
    stream_options: { continuous_usage_stats: true }, // so that a stopped answer is counted too
  };
  if ($("system").value.trim()) body.messages.unshift({ role: "system", content: $("system").value });
  if (goOn) {
    body.continue_final_message = true;
    body.add_generation_prompt = false;
  }
  for (const name of kNumbers) if ($(name).value !== "") body[name] = Number($(name).value);
  return JSON.stringify(body);
}

/// Streams an answer: a new message, or (`goOn`) more of the last one.
async function answer(goOn) {
  complain("");
  const body = requestBody(goOn);
  if (!goOn) messages.push({ role: "assistant", content: "" });
  const message = messages[messages.length - 1];
  delete message.stats;
  abort = new AbortController();
  show();
  document.querySelector("main").scrollTop = 1e9;
  const start = performance.now();
  const stats = { tokens: 0, cached: 0, prompt: 0 };
  let last = start, chunks = 0;
  try {
    const reply = await fetch("/v1/chat/completions", { method: "POST", headers: headers(), body, signal: abort.signal });
    if (!reply.ok) throw new Error(await errorOf(reply));
    for await (const event of events(reply.body)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) {
        stats.tokens = event.usage.completion_tokens;
        stats.prompt = event.usage.prompt_tokens;
        stats.cached = event.usage.prompt_tokens_details.cached_tokens;
      }
      const choice = event.choices[0];
      if (!choice) continue;
      if (choice.finish_reason) stats.finish = choice.finish_reason;
      const { content = "", reasoning_content = "" } = choice.delta;
      if (!content && !reasoning_content) continue;
      last = performance.now();
      if (stats.first === undefined) stats.first = last - start;
      ++chunks;
      message.content += content;
      if (reasoning_content) message.reasoning = (message.reasoning ?? "") + reasoning_content;
      grow();
    }
  } catch (error) {
    if (error.name === "AbortError") {
      stats.finish = "stopped";
    } else {
      complain(error.message);
    }
  }
  abort = null;
  const seconds = (last - start - stats.first) / 1000;
  if (stats.tokens > 1 && seconds > 0) stats.rate = (stats.tokens - 1) / seconds;
  if (chunks || goOn) message.stats = stats;
  else if (!message.content) messages.pop();
  show();
}

// ---- What people do

function send() {
  const text = $("input").value;
  if (abort || !text.trim()) return;
  $("input").value = "";
  fit();
  messages.push({ role: "user", content: text });
  answer(false);
}

function regenerate() {
  if (abort || !messages.length) return;
  if (messages[messages.length - 1].role === "assistant") messages.pop();
  if (messages.length) answer(false);
}

function continueAnswer() {
  if (!abort && messages.length && messages[messages.length - 1].role === "assistant") answer(true);
}

function edit(idx) {
  if (abort || idx < 0) return;
  editing = idx;
  show();
}

function stop() {
  abort?.abort();
}

function newChat() {
  stop();
  messages = [];
  editing = -1;
  complain("");
  show();
  $("input").focus();
}

function fit() {
  const box = $("input");
  box.style.height = "auto";
  box.style.height = box.scrollHeight + 2 + "px";
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem("nibble.theme", JSON.stringify(theme));
  } catch {
    // as above
  }
}

function toggleSettings() {
  $("settings").hidden = !$("settings").hidden;
  $("toggle").setAttribute("aria-expanded", String(!$("settings").hidden));
  if (!$("settings").hidden) document.querySelector("main").scrollTop = 0;
}

async function showModel() {
  const reply = await fetch("/v1/models", { headers: headers() });
  if (!reply.ok) {
    complain(await errorOf(reply));
    if (reply.status === 401 && $("settings").hidden) toggleSettings();
    return;
  }
  const model = (await reply.json()).data[0];
  $("model").textContent = `${model.id} · ${model.max_model_len} tokens of context`;
  complain("");
}

messages = load(localStorage, "messages", []);
const settings = load(localStorage, "settings", {});
for (const name of kSettings) $(name).value = settings[name] ?? "";
$("key").value = load(sessionStorage, "key", "");
setTheme(load(localStorage, "theme", null) ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("input").addEventListener("input", fit);
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  } else if (event.key === "ArrowUp" && !$("input").value) {
    event.preventDefault();
    edit(messages.findLastIndex((message) => message.role === "user"));
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
  if (!event.altKey || event.ctrlKey || event.metaKey) return;
  const action = { KeyN: newChat, KeyR: regenerate, KeyC: continueAnswer, KeyS: toggleSettings }[event.code];
  if (!action) return;
  event.preventDefault();
  action();
});
$("stop").addEventListener("click", stop);
$("new").addEventListener("click", newChat);
$("toggle").addEventListener("click", toggleSettings);
$("theme").addEventListener("click", () =>
  setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
for (const name of kSettings) $(name).addEventListener("change", save);
$("key").addEventListener("change", () => showModel().catch((error) => complain(error.message)));
show();
showModel().catch((error) => complain(error.message));
