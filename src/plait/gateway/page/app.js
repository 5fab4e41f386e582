// The chat: a conversation, one answer at a time, and the state of the server that gives it.

import { copyButton } from "./copy.js";
import { formatLoading, formatMs, formatSpeed } from "./format.js";
import { GrowingText } from "./markdown.js";
import { closeRail, setUpRail, showAnswer, showSnippet, showStatus, showUnknown } from "./rail.js";
import { getStatus, hasKey, ServerError, setKey, streamChat } from "./server.js";
import { chosenSettings, setUpSettings, settingsOpen, systemMessages } from "./settings.js";
import { hideSwarm, refreshSwarm, setUpSwarm } from "./swarm.js";

const EXAMPLES = ["Who are you?", "What does json.dumps do?", "What is a generator in Python?"];
const WATCH_MS = 1000;
const SHOW_SPEED_MS = 250; // faster than this, numbers cannot be read
const NEAR_END_PX = 80;

const find = (id) => document.getElementById(id);
const question = find("question");
const scroll = find("scroll");

let modelName = null; // null: the server cannot serve, or has not said yet that it can
let needsKey = false;
let answering = null; // the AbortController of the answer that is being written
let turns = []; // { role, content } as the server wants them
let followsEnd = true;

// -- conversation --------------------------------------------------------------------------------------

function send(text) {
  if (answering || modelName === null) return;
  closeRail();
  // A question that got no answer is not part of the chat: many chat templates demand alternating roles.
  if (turns.at(-1)?.role === "user") turns.pop();
  for (const button of find("messages").querySelectorAll(".error button")) button.remove();
  addMessage("user", "You").text.show(text);
  turns.push({ role: "user", content: text });
  question.value = "";
  fitQuestion();
  followsEnd = true;
  answer();
}

async function answer() {
  const message = addMessage("assistant", modelName);
  const controller = (answering = new AbortController());
  showControls();
  message.element.setAttribute("aria-busy", "true");
  const tally = { sentMs: performance.now(), firstMs: null, lastMs: null, tokens: 0 };
  let written = "";
  let finishReason = null;
  let failure = null;
  let frame = 0;
  const paint = () => {
    frame = 0;
    message.text.show(written);
    keepEnd();
  };
  showAnswer(summary(tally));
  const ticker = setInterval(() => showAnswer(summary(tally)), SHOW_SPEED_MS);
  try {
    const request = { model: modelName, messages: [...systemMessages(), ...turns], ...chosenSettings() };
    for await (const event of streamChat(request, controller.signal)) {
      if (event.text) {
        tally.lastMs = performance.now();
        tally.firstMs ??= tally.lastMs;
        tally.tokens += event.tokens;
        written += event.text;
        frame ||= requestAnimationFrame(paint);
      }
      finishReason = event.finishReason ?? finishReason;
      if (event.usage) tally.tokens = event.usage.completion_tokens;
    }
  } catch (error) {
    if (error.name === "AbortError") finishReason = "stopped";
    else failure = error;
  }
  clearInterval(ticker);
  cancelAnimationFrame(frame);
  if (answering === controller) answering = null;
  if (!message.element.isConnected) return; // a new chat has begun
  paint();
  message.element.removeAttribute("aria-busy");
  showAnswer(summary(tally));
  if (written) {
    turns.push({ role: "assistant", content: written });
    message.element.append(underLine(written, tally, finishReason));
  } else if (failure || finishReason === "stopped") {
    message.element.remove();
  } else {
    message.element.append(underLine("", tally, finishReason));
  }
  if (failure) fail(failure);
  else announce(finishReason === "stopped" ? "Stopped." : `Answer complete, ${tally.tokens} tokens.`);
  showControls();
  keepEnd();
}

function stop() {
  answering?.abort();
}

function startNewChat() {
  stop();
  answering = null;
  turns = [];
  find("messages").replaceChildren();
  find("welcome").hidden = false;
  find("latest").hidden = true;
  showAnswer({ speed: null, firstTokenMs: null, tokens: null });
  closeRail();
  showControls();
  question.focus();
}

function addMessage(role, name) {
  find("welcome").hidden = true;
  const element = document.createElement("article");
  element.className = `message ${role}`;
  const who = document.createElement("span");
  who.className = "who";
  who.textContent = name;
  const body = document.createElement("div");
  body.className = "body";
  element.append(who, body);
  find("messages").append(element);
  return { element, text: new GrowingText(body) };
}

function underLine(written, tally, finishReason) {
  const { speed, firstTokenMs, tokens } = summary(tally);
  const line = document.createElement("div");
  line.className = "under";
  if (written) line.append(copyButton(() => written));
  const parts = [`${tokens} ${tokens === 1 ? "token" : "tokens"}`];
  if (speed !== null) parts.push(`${formatSpeed(speed)} tokens/s`);
  if (firstTokenMs !== null) parts.push(`first after ${formatMs(firstTokenMs)}`);
  if (finishReason === "length") parts.push("cut at the longest answer allowed");
  if (finishReason === "stopped") parts.push("stopped");
  if (!written && finishReason === "stop") parts.push("the model ended its answer at once");
  line.append(parts.join(", "));
  return line;
}

function summary({ sentMs, firstMs, lastMs, tokens }) {
  if (firstMs === null) return { speed: null, firstTokenMs: null, tokens };
  // Tokens that came in one burst say nothing about speed.
  const speed = lastMs - firstMs >= 50 ? (tokens - 1) / ((lastMs - firstMs) / 1000) : null;
  return { speed, firstTokenMs: firstMs - sentMs, tokens };
}

function fail(error) {
  if (error.status === 401) askForKey();
  const note = document.createElement("div");
  note.className = "error";
  note.setAttribute("role", "alert");
  const text = document.createElement("p");
  text.textContent = error instanceof ServerError ? error.message : "The page could not read the answer. Try again.";
  const again = document.createElement("button");
  again.type = "button";
  again.className = "quiet";
  again.textContent = "Try again";
  again.addEventListener("click", () => {
    if (answering || modelName === null) return;
    if (turns.at(-1)?.role === "assistant") {
      turns.pop();
      note.previousElementSibling?.remove();
    }
    note.remove();
    answer();
  });
  note.append(text, again);
  find("messages").append(note);
}

function announce(text) {
  find("announcer").textContent = text;
}

function keepEnd() {
  if (followsEnd) scroll.scrollTop = scroll.scrollHeight;
}

function showControls() {
  find("send").hidden = answering !== null;
  find("stop").hidden = answering === null;
  find("send").disabled = modelName === null || question.value.trim() === "";
  for (const example of find("prompts").querySelectorAll("button")) example.disabled = modelName === null;
}

function fitQuestion() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
}

// -- the server's state --------------------------------------------------------------------------------

async function watch() {
  for (;;) {
    if (document.visibilityState === "visible" && !needsKey) {
      try {
        const status = await getStatus();
        showServer(status);
        if (status.swarm && status.state === "ready") await refreshSwarm();
        else hideSwarm();
      } catch (error) {
        if (!(error instanceof ServerError)) throw error;
        if (error.status === 401) askForKey();
        else showNotReady("offline", "not connected", "Not connected", error.message);
      }
    }
    await new Promise((resolve) => setTimeout(resolve, WATCH_MS));
  }
}

function showServer(status) {
  switch (status.state) {
    case "ready":
      find("loading").hidden = true;
      showStatus(status);
      if (modelName === null) {
        modelName = status.model;
        question.placeholder = `Ask ${modelName} something`;
        showState("ready", modelName);
        showControls();
      }
      break;
    case "loading":
      showNotReady("loading", "loading", `Loading ${status.model}`, formatLoading(status.loading), status.loading);
      break;
    case "draining":
      showNotReady("draining", "stopping", "Stopping", "The server finishes what it runs and takes no new questions.");
      break;
    default:
      showNotReady("failed", "failed", "The server cannot serve", status.failure ?? "Its log says why.");
  }
}

function showNotReady(state, name, title, text, loading = null) {
  modelName = null;
  find("loading").hidden = false;
  find("loading-title").textContent = title;
  find("loading-stage").textContent = text;
  const progress = find("loading-progress");
  progress.hidden = loading === null;
  if (loading?.total_bytes) progress.value = loading.done_bytes / loading.total_bytes;
  else progress.removeAttribute("value");
  showState(state, name);
  showUnknown();
  showControls();
}

function showState(state, name) {
  find("model").dataset.state = state;
  find("model-name").textContent = name;
  document.title = state === "ready" ? `plait: ${name}` : "plait";
}

function askForKey() {
  const refused = hasKey() && !needsKey;
  needsKey = true;
  modelName = null;
  find("loading").hidden = true;
  if (refused) find("key-reason").textContent = "The server does not know the key this tab was using. Give another one.";
  find("key-form").hidden = false;
  showState("offline", "key needed");
  showUnknown();
  showControls();
}

// -- wiring --------------------------------------------------------------------------------------------

find("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = question.value.trim();
  if (text) send(text);
});
question.addEventListener("input", () => {
  fitQuestion();
  showControls();
});
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  find("composer").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !settingsOpen()) stop();
});
find("stop").addEventListener("click", stop);
find("new-chat").addEventListener("click", startNewChat);
find("latest").addEventListener("click", () => {
  followsEnd = true;
  keepEnd();
});
scroll.addEventListener("scroll", () => {
  followsEnd = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < NEAR_END_PX;
  find("latest").hidden = followsEnd;
});
find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(find("key").value.trim());
  find("key").value = "";
  find("key-form").hidden = true;
  needsKey = false;
  showSnippet();
  showState("connecting", "connecting");
});
for (const example of EXAMPLES) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = example;
  button.addEventListener("click", () => send(example));
  item.append(button);
  find("prompts").append(item);
}

setUpSettings();
setUpRail();
setUpSwarm();
showControls();
if (matchMedia("(pointer: fine)").matches) question.focus();
watch();
