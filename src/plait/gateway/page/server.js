// The server's API as this page uses it. Every failure is a ServerError whose message is a sentence for people.

import { recall, remember } from "./storage.js";

const STATUS_TIMEOUT_MS = 5000;
const KEY_NAME = "plait-api-key";
let apiKey = recall("sessionStorage", KEY_NAME);

export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status; // 0: nothing answered, or the answer broke off
  }
}

export function hasKey() {
  return apiKey !== null;
}

export function setKey(key) {
  apiKey = key;
  remember("sessionStorage", KEY_NAME, key);
}

// The state of the server: 200 also while it loads, so that watching it leaves no errors in the console.
export async function getStatus() {
  const response = await call("status", { cache: "no-store", signal: AbortSignal.timeout(STATUS_TIMEOUT_MS) });
  return response.json();
}

// The machines of the swarm that this server is the gateway of, with some of the links of each.
export async function getSwarm(maxLinks) {
  const response = await call(`swarm/status?max_links=${maxLinks}`, { cache: "no-store", signal: AbortSignal.timeout(STATUS_TIMEOUT_MS) });
  return response.json();
}

// The chain that a request would get now, beside the front of chains.
export async function getRoute() {
  const response = await call("swarm/route", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ beside_front: true }),
    signal: AbortSignal.timeout(STATUS_TIMEOUT_MS),
  });
  return response.json();
}

export async function getTicket() {
  const response = await call("swarm/ticket", { cache: "no-store" });
  return (await response.json()).ticket;
}

// Yields { text, tokens, finishReason, usage } for each event of the answer; `tokens` is 1 for a chunk of text.
export async function* streamChat(request, signal) {
  const body = { ...request, stream: true, stream_options: { include_usage: true } };
  const response = await call("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  let ended = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") {
      ended = true;
      break;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(sentence(chunk.error.message));
    const choice = chunk.choices?.[0];
    const text = choice?.delta?.content ?? "";
    yield { text, tokens: text ? 1 : 0, finishReason: choice?.finish_reason ?? null, usage: chunk.usage ?? null };
  }
  if (!ended) throw new ServerError("The connection ended in the middle of the answer. Try again.");
}

async function call(path, options) {
  const headers = new Headers(options.headers);
  if (apiKey) headers.set("Authorization", `Bearer ${apiKey}`);
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer. Check that it is running and that you are connected to it.");
  }
  if (response.ok) return response;
  let body = {};
  try {
    body = await response.json();
  } catch {
    // A proxy's error page, or nothing: the status says enough.
  }
  const message = body.error?.message ?? `The server answered with status ${response.status}.`;
  throw new ServerError(sentence(message), response.status);
}

// Server-sent events (WHATWG HTML, section 9.2), of which OpenAI's streams use data lines only.
async function* events(stream) {
  const decoder = new TextDecoder();
  const reader = stream.getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
      rest = lines.pop();
      for (const line of lines.map((line) => line.replace(/\r$/, ""))) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function sentence(message) {
  const text = message.trim();
  const capital = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(capital) ? capital : `${capital}.`;
}
