// The swarm behind this server: its machines and their blocks, the links between them, the route of a request, and the
// line with which another machine joins. What machines say of themselves enters the document as text only.

import { copyOnClick } from "./copy.js";
import { formatBytes, formatLoading, formatMs, formatSpeed } from "./format.js";
import { getRoute, getSwarm, getTicket, ServerError } from "./server.js";

const SHOWN_MACHINES = 100;
const SHOWN_LINKS = 8;
const ROUTE_MS = 5000;
const MANY_MACHINES = 50; // from here on everything is asked for less often, since it costs the server something
const MANY_MS = 10_000;
const SPEED_MS = 5000; // over which tokens are counted, or since the last look if that is longer ago
const SVG = "http://www.w3.org/2000/svg";
const PLOT = { left: 8, right: 272, top: 20, bottom: 124 };

const find = (id) => document.getElementById(id);
const rows = new Map(); // by machine: its elements and the tokens counted lately
let shownMs = -Infinity;
let routeShownMs = -Infinity;

export function setUpSwarm() {
  find("show-join").addEventListener("click", toggleJoin);
  copyOnClick(find("copy-join"), () => find("join-line").textContent);
}

export function hideSwarm() {
  find("swarm").hidden = true;
  shownMs = routeShownMs = -Infinity;
}

export async function refreshSwarm() {
  const many = rows.size > MANY_MACHINES;
  if (many && performance.now() - shownMs < MANY_MS) return;
  shownMs = performance.now();
  const swarm = await getSwarm(SHOWN_LINKS);
  find("swarm").hidden = false;
  showSummary(swarm);
  showMachines(swarm);
  showJoinNote(swarm);
  if (swarm.missing_blocks) find("route").hidden = true;
  else if (performance.now() - routeShownMs >= (many ? MANY_MS : ROUTE_MS) && isVisible(find("swarm"))) {
    routeShownMs = performance.now();
    try {
      showRoute(await getRoute());
    } catch (error) {
      if (!(error instanceof ServerError) || error.status === 401) throw error;
      find("route").hidden = true; // machines went meanwhile
    }
  }
}

function isVisible(element) {
  return element.getClientRects().length > 0;
}

// -- machines ------------------------------------------------------------------------------------------

function showSummary(swarm) {
  const serving = swarm.machines.filter((machine) => machine.end_block > machine.first_block).length;
  const parts = [`${swarm.blocks} blocks on ${count(serving, "machine")}`, count(swarm.sessions, "session")];
  if (swarm.recoveries_total) parts.push(`${swarm.recoveries_total} failed over`);
  find("swarm-summary").textContent = parts.join(", ");
  const lack = find("swarm-lack");
  lack.hidden = !swarm.missing_blocks;
  if (swarm.missing_blocks) lack.textContent = `No machine serves blocks ${swarm.missing_blocks}. One that joins will.`;
}

function showMachines(swarm) {
  const machines = [...swarm.machines].sort(inChainOrder);
  const shown = machines.slice(0, SHOWN_MACHINES);
  const names = new Map(machines.map((machine) => [machine.peer, machine.name]));
  for (const [peer, row] of rows) {
    if (shown.some((machine) => machine.peer === peer)) continue;
    row.element.remove();
    rows.delete(peer);
  }
  shown.forEach((machine, place) => {
    if (!rows.has(machine.peer)) rows.set(machine.peer, new MachineRow());
    const row = rows.get(machine.peer);
    row.show(machine, swarm, names);
    const list = find("machines");
    if (list.children[place] !== row.element) list.insertBefore(row.element, list.children[place] ?? null);
  });
  const more = machines.length - shown.length;
  find("machines-more").hidden = more === 0;
  find("machines-more").textContent = `and ${more} more; plait status lists them all`;
}

// By blocks, those without any last.
function inChainOrder(one, other) {
  const first = (machine) => (machine.end_block > machine.first_block ? machine.first_block : Infinity);
  return first(one) - first(other) || one.end_block - other.end_block || one.name.localeCompare(other.name);
}

class MachineRow {
  constructor() {
    this.element = element("li", "machine");
    const details = element("details");
    const summary = element("summary");
    this.name = element("span", "machine-name");
    this.speed = element("span", "machine-speed");
    this.track = svg("svg", { class: "track", preserveAspectRatio: "none", "aria-hidden": "true" });
    this.all = svg("rect", { class: "all", x: 0, y: 0, height: 1 });
    this.span = svg("rect", { class: "span", y: 0, height: 1 });
    this.track.append(this.all, this.span);
    this.line = element("span", "machine-line");
    this.progress = document.createElement("progress");
    this.progress.hidden = true;
    this.facts = document.createElement("dl");
    summary.append(this.name, this.speed, this.track, this.line, this.progress);
    details.append(summary, this.facts);
    this.element.append(details);
    this.counted = []; // [ms, tokens so far]
  }

  show(machine, swarm, names) {
    const state = shownState(machine);
    this.element.dataset.state = state;
    this.element.dataset.busy = String(machine.gateway_sessions > 0);
    this.name.textContent = machine.name + (machine.is_gateway ? " (this server)" : "");
    this.track.setAttribute("viewBox", `0 0 ${swarm.blocks} 1`);
    this.all.setAttribute("width", swarm.blocks);
    this.span.setAttribute("x", machine.first_block);
    this.span.setAttribute("width", machine.end_block - machine.first_block);
    this.showSpeed(machine);
    this.line.textContent = machineLine(machine, state);
    const { loading } = machine;
    this.progress.hidden = loading === null;
    if (loading?.total_bytes) this.progress.value = loading.done_bytes / loading.total_bytes;
    else this.progress.removeAttribute("value");
    this.facts.replaceChildren(...machineFacts(machine, swarm, names).map(([name, value]) => fact(name, value)));
  }

  showSpeed(machine) {
    const nowMs = performance.now();
    this.counted.push([nowMs, machine.gateway_tokens_total]);
    while (this.counted.length > 2 && nowMs - this.counted[0][0] > SPEED_MS) this.counted.shift();
    const [[firstMs, first]] = this.counted;
    const speed = nowMs > firstMs ? ((machine.gateway_tokens_total - first) * 1000) / (nowMs - firstMs) : 0;
    this.speed.textContent = speed > 0 ? `${formatSpeed(speed)} tok/s` : "";
  }
}

// `lost` is said by nobody: a machine that is gone says nothing any more.
function shownState(machine) {
  const isOther = !machine.is_gateway && machine.end_block > machine.first_block;
  return machine.banned || (isOther && machine.state === "online" && !machine.linked) ? "lost" : machine.state;
}

function machineLine(machine, state) {
  if (machine.loading) return formatLoading(machine.loading);
  if (machine.end_block === machine.first_block) return "passes requests on";
  const parts = [`blocks ${machine.first_block}:${machine.end_block}`];
  if (state === "lost") parts.push("not reached");
  else if (state !== "online") parts.push({ joining: "joining", draining: "leaving" }[state] ?? state);
  parts.push(count(Math.max(machine.sessions, machine.gateway_sessions), "session"));
  if (machine.rtt_s !== null) parts.push(formatMs(machine.rtt_s * 1000));
  return parts.join(" · ");
}

function machineFacts(machine, swarm, names) {
  const facts = [["Memory", formatBytes(machine.memory_bytes)]];
  if (machine.kv_total_tokens) {
    const used = machine.kv_total_tokens - machine.kv_free_tokens;
    facts.push(["Context in use", `${used} of ${machine.kv_total_tokens} tokens`]);
  }
  if (machine.step_s) facts.push(["Step", formatMs(machine.step_s * 1000)]);
  if (machine.end_block > machine.first_block) facts.push(["Waiting there", count(machine.queued_tokens, "token")]);
  if (machine.decode_tokens_per_s) {
    facts.push(["One block, alone", `${formatSpeed(machine.decode_tokens_per_s)} tokens/s`]);
  }
  if (machine.prefill_tokens_per_s) {
    facts.push(["One block, prompts", `${formatSpeed(machine.prefill_tokens_per_s)} tokens/s`]);
  }
  facts.push(["Sent, received", `${formatBytes(machine.sent_bytes)}, ${formatBytes(machine.received_bytes)}`]);
  const links = swarm.links.filter((link) => link.from === machine.peer && link.rtt_s !== null && names.has(link.to));
  links.sort((one, other) => one.rtt_s - other.rtt_s);
  for (const link of links) facts.push([`To ${names.get(link.to)}`, formatMs(link.rtt_s * 1000)]);
  if (machine.through.length) {
    facts.push(["Reached through", machine.through.map((peer) => names.get(peer) ?? peer.slice(0, 12)).join(", ")]);
  }
  facts.push(["Weights, cache", `${machine.weight_format}, ${machine.kv_format}`], ["Id", machine.peer.slice(0, 12)]);
  return facts;
}

// -- the route -----------------------------------------------------------------------------------------

const OBJECTIVES = {
  step_s: ["time for a token", (value) => formatMs(value * 1000)],
  rate_tokens_per_s: ["tokens/s", (value) => formatSpeed(value)],
};
const isBetterHigher = (name) => name === "rate_tokens_per_s";

function showRoute({ mode, chain, values, front }) {
  find("route").hidden = false;
  find("route-chain").textContent = chainText(chain);
  const points = front.members.map((member) => ({ text: chainText(member.chain), values: member.values }));
  const chosen = { text: chainText(chain), values };
  drawFront(find("front"), front.objectives, points.filter(isFinitePoint), isFinitePoint(chosen) ? chosen : null);
  const shown = front.objectives.map((name, axis) => `${axisText(name)} ${valueText(name, values[axis])}`);
  find("route-note").textContent =
    `Mode ${mode}. The line is the ${front.exact ? "" : "part found of the "}front: chains that no other beats in both, ` +
    `by PETALS’ cost model. The full dot is this route: ${shown.join(", ")}.`;
}

function isFinitePoint({ values }) {
  return values.every((value) => value !== null);
}

// Lower is better to the left, higher is better upwards: what is best stands in the upper left corner.
function drawFront(plot, [first, second], points, chosen) {
  const all = chosen ? [...points, chosen] : points;
  const place = (axis, name, low, high) => {
    const numbers = all.map((point) => point.values[axis]);
    const [least, most] = [Math.min(...numbers), Math.max(...numbers)];
    const range = most - least || 1;
    return (value) => {
      const part = most === least ? 0.5 : 0.08 + (0.84 * (value - least)) / range;
      return isBetterHigher(name) === axis > 0 ? low + part * (high - low) : high - part * (high - low);
    };
  };
  const x = place(0, first, PLOT.left, PLOT.right);
  const y = place(1, second, PLOT.bottom, PLOT.top);
  const axes = svg("path", { class: "axes", d: `M${PLOT.left} ${PLOT.top}V${PLOT.bottom}H${PLOT.right}` });
  const line = points.map(({ values }) => `${x(values[0]).toFixed(1)} ${y(values[1]).toFixed(1)}`);
  const dots = points.map((point) => dot(point, x, y, "dot-front", 4));
  const marks = chosen ? [dot(chosen, x, y, "dot-chosen", 6)] : [];
  plot.replaceChildren(
    axes,
    svg("path", { class: "line", d: line.length ? `M${line.join("L")}` : "" }),
    ...dots,
    ...marks,
    label(axisText(second), PLOT.left, 12, "start"),
    label(axisText(first), PLOT.right, 144, "end"),
    label(all.length ? edgeText(all, 0, first) : "", PLOT.left, 144, "start"),
    label(all.length ? edgeText(all, 1, second) : "", PLOT.right, 12, "end"),
  );
  plot.setAttribute(
    "aria-label",
    `Front of ${count(points.length, "chain")}${chosen ? `; chosen: ${chosen.text}` : ""}`,
  );
}

function dot(point, x, y, name, radius) {
  const circle = svg("circle", { class: name, cx: x(point.values[0]), cy: y(point.values[1]), r: radius });
  const title = svg("title", {});
  title.textContent = point.text;
  circle.append(title);
  return circle;
}

function edgeText(points, axis, name) {
  const numbers = points.map((point) => point.values[axis]);
  const [least, most] = [valueText(name, Math.min(...numbers)), valueText(name, Math.max(...numbers))];
  return least === most ? least : `${least} to ${most}`;
}

function axisText(name) {
  return OBJECTIVES[name]?.[0] ?? name;
}

function valueText(name, value) {
  if (value === null) return "unknown";
  return OBJECTIVES[name]?.[1](value) ?? value.toPrecision(3);
}

function chainText(chain) {
  return chain.map((hop) => `${hop.name || hop.peer.slice(0, 12)} ${hop.first_block}:${hop.end_block}`).join(" → ");
}

// -- joining -------------------------------------------------------------------------------------------

async function toggleJoin() {
  const button = find("show-join");
  const opens = find("join").hidden;
  if (opens) {
    try {
      find("join-line").textContent = `plait join ${await getTicket()}`;
    } catch (error) {
      if (!(error instanceof ServerError)) throw error;
      find("join-line").textContent = error.message;
    }
  } else find("join-line").textContent = "";
  find("join").hidden = !opens;
  button.setAttribute("aria-expanded", String(opens));
}

function showJoinNote(swarm) {
  const gateway = swarm.machines.find((machine) => machine.is_gateway);
  const isLocal = gateway?.addresses.every((address) => /^(unix|mem):|\/\/(127\.|localhost|\[::1\])/.test(address));
  find("join-note").textContent =
    "Run it on the other machine, and keep it as you would a password." +
    (isLocal ? " As this server was started, only processes of its own computer reach it: --swarm-listen 0.0.0.0:7000 lets others in." : "");
}

// -- small things --------------------------------------------------------------------------------------

function element(name, className = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  return made;
}

function svg(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  return made;
}

function label(text, x, y, anchor) {
  const made = svg("text", { x, y, "text-anchor": anchor });
  made.textContent = text;
  return made;
}

function fact(name, value) {
  const row = document.createElement("div");
  const term = document.createElement("dt");
  const definition = document.createElement("dd");
  term.textContent = name;
  definition.textContent = value;
  row.append(term, definition);
  return row;
}

function count(number, noun) {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}
