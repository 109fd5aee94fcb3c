// Talks and settings, kept in the browser's localStorage: each talk is an entry of its own.

const TALK = "qrun.talk.";
const SETTINGS = "qrun.settings";
const ROLES = new Set(["user", "assistant"]);

// Where there is no storage (forbidden by the browser), things live as long as the page.
let storage;
try {
  storage = window.localStorage;
  storage.getItem(SETTINGS);
} catch {
  const entries = new Map();
  storage = {
    get length() { return entries.size; },
    key: (index) => [...entries.keys()][index] ?? null,
    getItem: (name) => entries.get(name) ?? null,
    setItem: (name, value) => void entries.set(name, value),
    removeItem: (name) => void entries.delete(name),
  };
}

export function newTalk() {
  // crypto.randomUUID is there for https and localhost only
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  const id = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  const now = Date.now();
  return { id, title: "", created: now, updated: now, system: "", messages: [] };
}

export function titleOf(talk) {
  if (talk.title) return talk.title;
  const first = talk.messages.find((message) => message.role === "user")?.content ?? "";
  const line = first.trim().split("\n", 1)[0];
  const letters = Array.from(line);
  return letters.length > 60 ? `${letters.slice(0, 59).join("")}…` : line || "New talk";
}

/** All talks that are kept, the latest first. */
export function loadTalks() {
  const talks = [];
  for (let index = 0; index < storage.length; index++) {
    const name = storage.key(index);
    if (!name?.startsWith(TALK)) continue;
    const talk = loadTalk(name.slice(TALK.length));
    if (talk) talks.push(talk);
  }
  return talks.sort((a, b) => b.updated - a.updated);
}

export function loadTalk(id) {
  try {
    return checked({ ...JSON.parse(storage.getItem(TALK + id)), id });
  } catch {
    return null;
  }
}

/** Keep a talk. False where the browser has no more room. */
export function saveTalk(talk) {
  try {
    storage.setItem(TALK + talk.id, JSON.stringify(talk));
    return true;
  } catch {
    return false;
  }
}

export function deleteTalk(id) {
  storage.removeItem(TALK + id);
}

export function isTalkEntry(name) {
  return name === null || name.startsWith(TALK);
}

export function loadSettings() {
  try {
    const found = JSON.parse(storage.getItem(SETTINGS));
    return found && typeof found === "object" ? found : {};
  } catch {
    return {};
  }
}

export function saveSettings(settings) {
  try {
    storage.setItem(SETTINGS, JSON.stringify(settings));
  } catch {
    // They hold until the page is closed.
  }
}

export function exportTalks() {
  return JSON.stringify({ format: "qrun talks", version: 1, talks: loadTalks() }, null, 1);
}

/** Keep the talks of an exported file; returns how many. A talk that is here already is replaced only by a later one. */
export function importTalks(text) {
  let found;
  try {
    found = JSON.parse(text);
  } catch {
    throw new Error("The file is not JSON.");
  }
  const talks = Array.isArray(found) ? found : found?.talks;
  if (!Array.isArray(talks)) throw new Error("The file has no talks in it.");
  const good = talks.map(checked);
  if (good.includes(null)) throw new Error("The file has something in it that is no talk; nothing was imported.");
  let count = 0;
  for (const talk of good) {
    const old = loadTalk(talk.id);
    if (old && old.updated >= talk.updated) continue;
    if (!saveTalk(talk)) throw new Error(`The browser has no room for more talks: ${count} were imported.`);
    count++;
  }
  return count;
}

function string(value) {
  return typeof value === "string" ? value : "";
}

/** A talk with all its parts of the right types, or null. */
function checked(value) {
  if (!value || typeof value !== "object" || !Array.isArray(value.messages)) return null;
  const talk = newTalk();
  if (/^[\w-]{1,64}$/.test(value.id)) talk.id = value.id;
  for (const name of ["title", "system"]) talk[name] = string(value[name]);
  for (const name of ["created", "updated"]) if (Number.isFinite(value[name])) talk[name] = value[name];
  for (const one of value.messages) {
    if (!ROLES.has(one?.role) || typeof one.content !== "string") return null;
    const message = { role: one.role, content: one.content };
    for (const name of ["reasoning", "model", "error", "end"]) if (one[name]) message[name] = string(one[name]);
    if (one.stats && typeof one.stats === "object") {
      const numbers = Object.entries(one.stats).filter(([, number]) => Number.isFinite(number));
      message.stats = Object.fromEntries(numbers);
    }
    talk.messages.push(message);
  }
  return talk;
}
