// The chat page in headless Chromium against a running `nibble serve`: what people do on it, and
// screenshots to look at. Needs Debian's chromium package and playwright-core (package.json).
//   node page.mjs http://127.0.0.1:8000 SCREENSHOT_DIR
// SPDX-License-Identifier: Apache-2.0
import { chromium } from "playwright-core";

const [url, shots] = process.argv.slice(2);
const browser = await chromium.launch({ executablePath: "/usr/bin/chromium", args: ["--no-sandbox"] });
const page = await browser.newPage({ viewport: { width: 1000, height: 760 }, colorScheme: "light" });
const complaints = [];
page.on("console", (message) => message.type() === "error" && complaints.push(message.text()));
page.on("pageerror", (error) => complaints.push(String(error)));

function check(condition, what) {
  if (!condition) {
    console.error(`FAILED: ${what}\n${complaints.join("\n")}`);
    process.exit(1);
  }
  console.log(`ok: ${what}`);
}
const said = (role, idx = -1) => page.locator(`li.${role} .said`).nth(idx).innerText();
const idle = () => page.locator("#send").waitFor({ state: "visible" });

// A tiny model ends its answers early; the steps below need them to last a moment.
await page.route("**/v1/chat/completions", (route) =>
  route.continue({ postData: JSON.stringify({ ...JSON.parse(route.request().postData()), ignore_eos: true }) }));

await page.goto(url);
await page.locator("#model", { hasText: "tokens of context" }).waitFor();
await page.screenshot({ path: `${shots}/1-empty.png` });

await page.keyboard.press("Alt+s");
await page.fill("#system", "You answer in short sentences.");
await page.fill("#temperature", "0");
await page.fill("#max_tokens", "60");
await page.screenshot({ path: `${shots}/2-settings.png` });
await page.keyboard.press("Alt+s");

await page.evaluate(() => {
  window.lengths = new Set();
  new MutationObserver(() => {
    const last = [...document.querySelectorAll("li.assistant .said")].at(-1);
    if (last) window.lengths.add(last.innerText.length);
  }).observe(document.querySelector("#chat"), { childList: true, subtree: true, characterData: true });
});
await page.fill("#input", "What is water?");
await page.keyboard.press("Enter");
await idle();
const first = await said("assistant");
check(first.length > 20, "an answer");
check((await page.evaluate(() => window.lengths.size)) > 5, "it grew while it came");
check(/\d+ tokens · [\d.]+ tokens\/s · .* of \d+ prompt tokens cached/.test(
  await page.locator("li.assistant .stats").last().innerText()), "tokens/s and cached tokens");

await page.keyboard.press("Alt+r");
await page.locator("#stop").waitFor({ state: "visible" });
await idle();
check((await said("assistant")) === first, "regenerating greedily says the same");
check((await page.locator("li").count()) === 2, "in place of the old answer");

await page.keyboard.press("Alt+c");
await page.locator("#stop").waitFor({ state: "visible" });
await idle();
const longer = await said("assistant");
check(longer.length >= first.length && longer.startsWith(first.slice(0, 20)), "continue goes on");

await page.locator("#input").press("ArrowUp");
await page.locator("li.user textarea").fill("Tell me about **mountains**, `code` and <b>html</b>.");
await page.keyboard.press("Enter");
await idle();
check((await said("user")) === "Tell me about mountains, code and <b>html</b>.", "editing, and no HTML comes through");
check((await page.locator("li.user .said b").count()) === 0, "markup stays text");
await page.screenshot({ path: `${shots}/3-chat.png` });

await page.keyboard.press("Alt+s");
await page.fill("#max_tokens", "");
await page.keyboard.press("Alt+s");
await page.fill("#input", "Write a long story.");
await page.keyboard.press("Enter");
await page.locator("#stop").waitFor({ state: "visible" });
await page.waitForTimeout(200);
await page.keyboard.press("Escape");
await idle();
check(/^[1-9]\d* tokens .* of [1-9]\d* prompt tokens cached · stopped$/.test(await page.locator("li.assistant .stats").last().innerText()), "Esc stops");
await page.waitForTimeout(300);
const metrics = await (await fetch(`${url}/metrics`)).text();
check(/^vllm:kv_cache_usage_perc.* 0$/m.test(metrics), "and frees the KV cache");

await page.click("#theme");
check((await page.evaluate(() => document.documentElement.dataset.theme)) === "dark", "dark");
await page.screenshot({ path: `${shots}/4-dark.png` });
await page.reload();
check((await page.locator("li").count()) === 4, "the chat survives a reload");
check((await page.inputValue("#system")) === "You answer in short sentences.", "so do the settings");
await page.keyboard.press("Alt+n");
check((await page.locator("li").count()) === 0, "a new chat");

await page.setViewportSize({ width: 390, height: 740 });
await page.fill("#input", "What is a river?");
await page.keyboard.press("Enter");
await idle();
await page.screenshot({ path: `${shots}/5-phone.png` });
check(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), "fits a phone");

await page.unroute("**/v1/chat/completions");
await page.route("**/v1/chat/completions", (route) => route.fulfill({
  status: 429, contentType: "application/json", body: '{"error":{"message":"the queue is full","type":"x","param":null,"code":null}}' }));
await page.fill("#input", "Too much?");
await page.keyboard.press("Enter");
await page.locator("#problem", { hasText: "the queue is full" }).waitFor();
check(true, "errors are shown in the server's words");
const blocked = complaints.filter((text) => !/429/.test(text));
check(blocked.length === 0, "nothing in the console");
await browser.close();
