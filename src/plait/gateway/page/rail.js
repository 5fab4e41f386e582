// What the server is doing: the numbers beside the chat, and in one line above it on narrow screens.

import { copyOnClick } from "./copy.js";
import { formatMs, formatSpeed } from "./format.js";
import { hasKey } from "./server.js";

const POINTS = 60; // one a second: the last minute

const find = (id) => document.getElementById(id);
const rail = find("rail");
const pulse = find("pulse");
let answerSpeed = null;
let status = null;
const speeds = [];

export function setUpRail() {
  pulse.addEventListener("click", () => {
    const open = rail.classList.toggle("open");
    pulse.setAttribute("aria-expanded", String(open));
  });
  showSnippet();
  copyOnClick(find("copy-snippet"), () => find("snippet").textContent);
}

export function closeRail() {
  rail.classList.remove("open");
  pulse.setAttribute("aria-expanded", "false");
}

export function showSnippet() {
  const values = {
    OPENAI_BASE_URL: new URL("v1", document.baseURI).href,
    OPENAI_API_KEY: hasKey() ? '"the key you gave"' : "none",
  };
  const parts = Object.entries(values).flatMap(([name, value]) => {
    const head = document.createElement("span");
    head.textContent = `export ${name}=`;
    return [head, document.createElement("wbr"), `${value}\n`];
  });
  find("snippet").replaceChildren(...parts);
}

export function showAnswer({ speed, firstTokenMs, tokens }) {
  answerSpeed = speed;
  find("speed").textContent = speed === null ? "–" : formatSpeed(speed);
  find("speed").classList.toggle("unknown", speed === null);
  find("first-token").textContent = firstTokenMs === null ? "–" : formatMs(firstTokenMs);
  find("answer-tokens").textContent = tokens === null ? "–" : String(tokens);
  showPulse();
}

export function showStatus(next) {
  status = next;
  find("running").textContent = next.running;
  find("waiting").textContent = next.waiting;
  // The gateway of a swarm has no cache of its own; its machines show theirs.
  for (const id of ["kv-row", "kv-gauge"]) find(id).hidden = next.kv_blocks_total === 0;
  find("kv-blocks").textContent = `${next.kv_blocks_used} of ${next.kv_blocks_total}`;
  const fraction = next.kv_blocks_total ? next.kv_blocks_used / next.kv_blocks_total : 0;
  const gauge = find("kv-gauge");
  gauge.setAttribute("aria-valuenow", String(Math.round(fraction * 100)));
  gauge.setAttribute("aria-valuetext", find("kv-blocks").textContent);
  gauge.style.setProperty("--fraction", fraction);
  find("server-speed").textContent = formatSpeed(next.tokens_per_s);
  speeds.push(next.tokens_per_s);
  if (speeds.length > POINTS) speeds.shift();
  drawSpark();
  showPulse();
}

export function showUnknown() {
  status = null;
  for (const id of ["running", "waiting", "kv-blocks", "server-speed"]) find(id).textContent = "–";
  showPulse();
}

function drawSpark() {
  const highest = Math.max(...speeds, 1);
  const points = speeds.map((speed, index) => {
    const x = 120 - ((speeds.length - 1 - index) * 120) / (POINTS - 1);
    return `${x.toFixed(1)} ${(34 - (speed / highest) * 31).toFixed(1)}`;
  });
  const line = `M${points.join("L")}`;
  const spark = find("spark");
  spark.querySelector(".line").setAttribute("d", line);
  spark.querySelector(".area").setAttribute("d", `${line}V36H${points[0].split(" ")[0]}Z`);
}

function showPulse() {
  const parts = [];
  if (answerSpeed !== null) parts.push(`${formatSpeed(answerSpeed)} tok/s`);
  if (status) {
    parts.push(`${status.running} running`, `${status.waiting} waiting`);
    if (status.kv_blocks_total) parts.push(`KV ${status.kv_blocks_used}/${status.kv_blocks_total}`);
  }
  find("pulse-text").textContent = parts.join(" · ") || "What the server is doing";
}
