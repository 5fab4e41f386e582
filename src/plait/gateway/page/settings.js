// The settings drawer: a system prompt and how to sample, kept in this browser.

import { recall, remember } from "./storage.js";

const NAME = "plait-settings";
const DEFAULTS = { system: "", temperature: "0.7", maxTokens: "", seed: "" };

const drawer = document.getElementById("settings");
const shown = document.getElementById("temperature-shown");
const fields = {
  system: document.getElementById("system"),
  temperature: document.getElementById("temperature"),
  maxTokens: document.getElementById("max-tokens"),
  seed: document.getElementById("seed"),
};

export function setUpSettings() {
  show(recallSettings());
  document.getElementById("open-settings").addEventListener("click", () => drawer.showModal());
  document.getElementById("reset-settings").addEventListener("click", () => {
    show(DEFAULTS);
    save();
  });
  drawer.addEventListener("input", save);
  // A click beside the drawer lands on the dialog itself: what is inside belongs to its form.
  drawer.addEventListener("click", (event) => {
    if (event.target === drawer) drawer.close();
  });
}

export function settingsOpen() {
  return drawer.open;
}

// The part of a request that the settings decide.
export function chosenSettings() {
  const chosen = { temperature: Number(fields.temperature.value) };
  if (fields.maxTokens.value && fields.maxTokens.validity.valid) chosen.max_tokens = Number(fields.maxTokens.value);
  if (fields.seed.value && fields.seed.validity.valid) chosen.seed = Number(fields.seed.value);
  return chosen;
}

export function systemMessages() {
  const content = fields.system.value.trim();
  return content ? [{ role: "system", content }] : [];
}

function show(settings) {
  for (const [name, field] of Object.entries(fields)) field.value = settings[name];
  shown.textContent = Number(fields.temperature.value).toFixed(2);
}

function save() {
  shown.textContent = Number(fields.temperature.value).toFixed(2);
  const settings = Object.fromEntries(Object.entries(fields).map(([name, field]) => [name, field.value]));
  remember("localStorage", NAME, JSON.stringify(settings));
}

function recallSettings() {
  try {
    return { ...DEFAULTS, ...JSON.parse(recall("localStorage", NAME)) };
  } catch {
    return DEFAULTS;
  }
}
