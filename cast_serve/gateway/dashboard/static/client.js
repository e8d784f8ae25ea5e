// A path -> the gateway's answer: asks for an API key when the gateway does, and reads SSE streams.

import { $ } from "./elements.js";

const REQUEST_TIMEOUT_MS = 10_000;
let key = "";
let newKey = null;

function askForKey(wasRefused) {
  newKey ??= new Promise((resolve) => {
    if (wasRefused) $("key-hint").textContent = "The gateway refused that key. Try another.";
    $("key-form").hidden = false;
    $("key").focus();
    $("key-form").onsubmit = (event) => {
      event.preventDefault();
      key = $("key").value;
      $("key").value = "";
      $("key-form").hidden = true;
      newKey = null;
      resolve();
    };
  });
  return newKey;
}

function unreachable(error) {
  throw error.name === "AbortError" ? error : new Error("The gateway does not answer.");
}

export async function request(path, options = {}, onSend = () => {}) {
  for (;;) {
    const used = key;
    const headers = { ...options.headers, ...(used && { Authorization: `Bearer ${used}` }) };
    const signal = options.signal ?? AbortSignal.timeout(REQUEST_TIMEOUT_MS);
    onSend();
    const response = await fetch(path, { ...options, headers, signal }).catch(unreachable);
    if (response.status !== 401) return response;
    if (key !== used) continue; // given while this request was under way
    const stopped = new Promise((_, reject) =>
      options.signal?.addEventListener("abort", () => reject(options.signal.reason)));
    await Promise.race([askForKey(used !== ""), stopped]);
  }
}

export async function checked(response) {
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const message = body?.error?.message;
  throw new Error(message ?? `The gateway answered ${response.status} ${response.statusText}`);
}

export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch(unreachable);
    if (done) throw new Error("The answer was cut off.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}
