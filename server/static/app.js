// The page: talks at the left, the open one in the middle, one form to write into.

import { ApiError, defaults, listModels, streamChat } from "./api.js";
import { showMarkdown } from "./markdown.js";
import {
  deleteTalk, exportTalks, importTalks, isTalkEntry, loadSettings, loadTalk, loadTalks, newTalk, saveSettings,
  saveTalk, titleOf,
} from "./talks.js";

const byId = (id) => document.getElementById(id);
const [box, log, scroller, modelPicker] = ["box", "log", "scroller", "model"].map(byId);

const DRAW_MS = 40; // between two drawings of an answer that grows
const SAVE_MS = 2000;
const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];
const THEMES = { "": "as the system", light: "light", dark: "dark" };
const isTouch = matchMedia("(hover: none) and (pointer: coarse)");
const isNarrow = matchMedia("(max-width: 760px)");

const settings = loadSettings();
settings.sampling ??= {};
let talks = loadTalks();
let current = newTalk();
let models = [];
let ownDefaults = {}; // of the chosen model
let editing = null; // the index of the message that is being edited
let sticks = true; // whether the end of the talk is kept in view

const running = new Map(); // talk id -> the answer under way
const views = new WeakMap(); // message -> its elements

// ---- small things

function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") element.className = value;
    else if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== null) element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

function icon(name) {
  const picture = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  picture.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  picture.append(use);
  return picture;
}

function tool(name, label, onclick) {
  return make("button", { type: "button", class: "icon", "aria-label": label, title: label, onclick }, icon(name));
}

function figure(value, digits = 0) {
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

function speed(value) {
  return value ? ` at ${figure(value, value < 100 ? 1 : 0)}/s` : "";
}

function counted(count, name) {
  return `${figure(count)} ${name}${count === 1 ? "" : "s"}`;
}

/** Tell those who listen. */
function announce(text) {
  byId("status").textContent = text;
}

let toastTimer;
function toast(text, action, onclick) {
  const place = byId("toast");
  const hide = () => { place.hidden = true; };
  place.replaceChildren(make("span", {}, text));
  if (action) place.append(make("button", { type: "button", onclick: () => { hide(); onclick(); } }, action));
  place.hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(hide, action ? 10000 : 5000);
}

function notice(text, action, onclick) {
  const place = byId("notice");
  if (!place.hidden && place.firstChild?.data === text) return; // the button in it may have the focus
  place.hidden = !text;
  place.replaceChildren(text);
  if (action) place.append(" ", make("button", { type: "button", onclick }, action));
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Without https there is no such thing but on localhost: the old way.
    const area = make("textarea", { class: "hidden", readonly: "" });
    const focused = document.activeElement;
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return done;
  }
}

async function copyBy(button, text, label) {
  const done = await copy(text);
  announce(done ? "Copied" : "Copying is not allowed here");
  button.classList.toggle("done", done);
  if (label) button.textContent = done ? "Copied" : "Not allowed";
  setTimeout(() => {
    button.classList.remove("done");
    if (label) button.textContent = label;
  }, 1500);
}

// ---- talks

function keep(talk, touch = true) {
  if (touch) talk.updated = Date.now();
  if (!talks.includes(talk)) talks.unshift(talk);
  if (!saveTalk(talk)) toast("The browser has no more room for talks. Export some and delete them.");
}

function drawTalks() {
  talks.sort((a, b) => b.updated - a.updated);
  byId("talks").replaceChildren(...talks.map((talk) => {
    const title = titleOf(talk);
    const open = make("button", { type: "button", class: "open", title, onclick: () => show(talk, true) }, title);
    if (talk === current) open.setAttribute("aria-current", "true");
    const row = make("li", { "data-id": talk.id }, open);
    if (running.has(talk.id)) row.classList.add("running");
    row.append(
      tool("edit", `Rename "${title}"`, () => rename(talk, row)),
      tool("delete", `Delete "${title}"`, () => remove(talk)),
    );
    return row;
  }));
}

function rename(talk, row) {
  const field = make("input", { type: "text", maxlength: "200", "aria-label": "Name of the talk" });
  field.value = titleOf(talk);
  let isDone = false;
  const end = (keeps) => {
    if (isDone) return;
    isDone = true;
    if (keeps && field.value.trim() !== titleOf(talk)) {
      talk.title = field.value.trim();
      keep(talk, false);
    }
    drawTalks();
    drawTitle();
    byId("talks").querySelector(`[data-id="${talk.id}"] .open`)?.focus();
  };
  field.addEventListener("keydown", (event) => {
    if (event.isComposing || !["Enter", "Escape"].includes(event.key)) return;
    event.preventDefault();
    event.stopPropagation();
    end(event.key === "Enter");
  });
  field.addEventListener("blur", () => end(true));
  row.replaceChildren(field);
  field.focus();
  field.select();
}

function remove(talk) {
  running.get(talk.id)?.controller.abort();
  talks = talks.filter((one) => one !== talk);
  deleteTalk(talk.id);
  if (talk === current) show(newTalk());
  drawTalks();
  byId("new").focus();
  toast(`Deleted "${titleOf(talk)}"`, "Undo", () => {
    keep(talk, false);
    show(talk, true);
  });
}

function show(talk, focuses = false) {
  current = talk;
  editing = null;
  sticks = true;
  history.replaceState(null, "", talks.includes(talk) ? `#talk-${talk.id}` : location.pathname + location.search);
  closeSide();
  drawTalks();
  drawLog();
  if (focuses && !isTouch.matches) box.focus();
}

function startTalk() {
  const talk = newTalk();
  talk.system = settings.keepsSystem ? settings.system ?? "" : "";
  show(talk, true);
}

function drawTitle() {
  byId("title").textContent = titleOf(current);
  document.title = current.messages.length ? `${titleOf(current)} - qrun` : "qrun";
}

// ---- messages

function drawLog() {
  log.replaceChildren(...current.messages.map((message, index) => messageElement(message, index)));
  byId("empty").hidden = current.messages.length > 0;
  drawTitle();
  drawState();
  follow();
}

function messageElement(message, index) {
  const isUser = message.role === "user";
  const body = make("div", { class: "body" });
  const view = { body };
  const name = isUser ? "You" : message.model || "Model";
  view.element = make("li", { class: message.role });
  const article = make("article", { "aria-label": isUser ? "You" : `Answer of ${name}` });
  view.element.append(article);
  if (!isUser) {
    view.summary = make("summary");
    view.reasoning = make("div", { class: "body" });
    view.thoughts = make("details", { class: "thoughts" }, view.summary, view.reasoning);
    article.append(make("div", { class: "name" }, name), view.thoughts);
  }
  view.foot = make("div", { class: "foot" });
  view.error = make("div", { class: "error" });
  article.append(body, view.error, view.foot);
  views.set(message, view);
  if (isUser && editing === index) {
    drawEditor(message, index, article);
  } else {
    drawMessage(message);
  }
  return view.element;
}

function drawMessage(message) {
  const view = views.get(message);
  if (!view) return;
  const index = current.messages.indexOf(message);
  const isGrowing = running.get(current.id)?.message === message;
  view.element.classList.toggle("growing", isGrowing);
  view.element.setAttribute("aria-busy", String(isGrowing));
  if (message.role === "user") {
    view.body.textContent = message.content;
  } else {
    showMarkdown(view.body, message.content);
    view.thoughts.hidden = !message.reasoning;
    if (message.reasoning) {
      const seconds = message.stats?.thinking;
      const isThinking = isGrowing && !message.content;
      view.summary.textContent = isThinking ? "Thinking…" : seconds ? `Thought for ${figure(seconds, 1)} s` : "Thoughts";
      showMarkdown(view.reasoning, message.reasoning);
    }
  }
  view.body.hidden = !message.content;
  drawError(view, message);
  if (isGrowing) {
    view.foot.replaceChildren();
    return;
  }
  const tools = make("div", { class: "tools" });
  if (message.content) {
    const button = tool("copy", "Copy the text", () => copyBy(button, message.content));
    tools.append(button);
  }
  // While an answer comes, the style sheet hides what would change the talk.
  if (message.role === "user") {
    tools.append(tool("edit", "Edit the message; what follows it goes", () => edit(index)));
    if (index === current.messages.length - 1) {
      tools.append(tool("retry", "Answer this message", () => retry(index + 1)));
    }
  } else {
    tools.append(tool("retry", "Answer once more; what follows goes", () => retry(index)));
  }
  view.foot.replaceChildren(tools);
  const told = statsText(message);
  if (told) view.foot.append(make("span", { class: "stats" }, told));
}

function drawError(view, message) {
  view.error.hidden = !message.error;
  view.error.replaceChildren(message.error ?? "");
  if (message.error && message.end === "key") {
    view.error.append(" ", make("button", { type: "button", onclick: openKey }, "Enter the API key"));
  }
}

function statsText(message) {
  const told = [];
  const stats = message.stats ?? {};
  if (message.end === "length") told.push("ended at the limit of tokens");
  if (message.end === "stopped") told.push("stopped");
  if (message.end === "stop" && !message.content) told.push("ended without an answer");
  const answer = stats.predicted_n ?? stats.completion_tokens;
  if (answer) told.push(counted(answer, "token") + speed(stats.predicted_per_second));
  const cached = stats.cached_tokens ?? stats.cache_n;
  const prompt = stats.prompt_tokens ?? (stats.prompt_n ?? 0) + (stats.cache_n ?? 0);
  if (prompt) {
    told.push(
      `prompt ${figure(prompt)}` + (cached ? ` (${figure(cached)} from cache)` : "") + speed(stats.prompt_per_second),
    );
  }
  if (stats.first) told.push(`first token after ${figure(stats.first, 2)} s`);
  return told.join(" · ");
}

function edit(index) {
  if (running.has(current.id)) return;
  editing = index;
  drawLog();
  const field = log.children[index]?.querySelector("textarea");
  field?.focus();
  field?.setSelectionRange(field.value.length, field.value.length);
}

function drawEditor(message, index, article) {
  const field = make("textarea", { "aria-label": "Edit the message", rows: "2" });
  field.value = message.content;
  const leave = () => {
    editing = null;
    drawLog();
    box.focus();
  };
  const send = () => {
    const text = field.value.trim();
    if (!text) return;
    editing = null;
    current.messages.splice(index);
    ask(text);
    box.focus();
  };
  field.addEventListener("input", () => fit(field));
  field.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Escape") {
      event.stopPropagation();
      leave();
    } else if (sends(event)) {
      event.preventDefault();
      send();
    }
  });
  article.replaceChildren(field, make(
    "div", { class: "edit-foot" },
    make("span", { class: "note" }, "What follows this message goes."),
    make("button", { type: "button", onclick: leave }, "Cancel"),
    make("button", { type: "button", class: "main", onclick: send }, "Send"),
  ));
  requestAnimationFrame(() => fit(field));
}

function retry(index) {
  if (running.has(current.id)) return;
  editing = null;
  current.messages.splice(index);
  if (current.messages.length) answer(current);
  if (!isTouch.matches) box.focus(); // the button that was pressed is gone
}

// ---- scrolling and what the page says of itself

function follow() {
  if (sticks) scroller.scrollTop = scroller.scrollHeight;
  drawLatest();
}

function drawLatest() {
  byId("latest").hidden = sticks || scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
}

function drawState() {
  const work = running.get(current.id);
  const send = byId("send");
  const label = work ? "Stop" : "Send";
  log.classList.toggle("busy", Boolean(work));
  send.setAttribute("aria-label", label);
  send.title = work ? "Stop (Esc)" : "Send (Enter)";
  send.classList.toggle("stop", Boolean(work));
  byId("send-icon").setAttribute("href", work ? "#i-stop" : "#i-send");
  drawWork(work);
  drawContext();
}

function drawWork(work) {
  byId("work").hidden = !work;
  if (!work) return;
  const bar = byId("work-bar");
  const progress = work.phase === "waiting" ? work.progress : null;
  bar.hidden = !progress;
  let text = { waiting: "Waiting for the first token", thinking: "Thinking", writing: "Writing" }[work.phase];
  if (progress) {
    bar.max = progress.total;
    bar.value = progress.processed;
    text = `Reading the prompt: ${figure(progress.processed)} of ${figure(progress.total)} tokens`;
    if (progress.cache) text += `, ${figure(progress.cache)} from cache`;
  }
  byId("work-text").textContent = text;
}

function chosenModel() {
  return models.find((model) => model.id === modelPicker.value);
}

function drawContext() {
  const last = current.messages.findLast((message) => message.stats?.prompt_tokens);
  const used = last ? last.stats.prompt_tokens + (last.stats.completion_tokens ?? 0) : 0;
  const size = chosenModel()?.context_length;
  byId("context").textContent = used ? `Context: ${figure(used)}${size ? ` of ${figure(size)}` : ""} tokens` : "";
}

// ---- answers

function ask(text) {
  current.messages.push({ role: "user", content: text });
  answer(current);
}

/** What the server is sent: messages of one role in a row (an answer failed) become one, as templates want turns. */
function messagesOf(talk) {
  const told = talk.system.trim() ? [{ role: "system", content: talk.system }] : [];
  for (const message of talk.messages) {
    const last = told.at(-1);
    if (!message.content) continue;
    if (last?.role === message.role) {
      last.content += `\n\n${message.content}`;
    } else {
      const one = { role: message.role, content: message.content };
      if (message.reasoning) one.reasoning_content = message.reasoning;
      told.push(one);
    }
  }
  return told;
}

function requestBody(talk) {
  const body = { messages: messagesOf(talk), return_progress: true };
  if (modelPicker.value) body.model = modelPicker.value;
  for (const name of NUMBERS) if (Number.isFinite(settings.sampling[name])) body[name] = settings.sampling[name];
  const thinking = settings.sampling.thinking;
  if (thinking) body.chat_template_kwargs = { enable_thinking: thinking === "on" };
  return body;
}

async function answer(talk) {
  const body = requestBody(talk);
  const message = { role: "assistant", content: "", model: modelPicker.value };
  talk.messages.push(message);
  const work = { controller: new AbortController(), message, phase: "waiting", progress: null };
  running.set(talk.id, work);
  keep(talk);
  sticks = true;
  history.replaceState(null, "", `#talk-${talk.id}`);
  drawTalks();
  drawLog();
  announce("The model is answering");

  const start = performance.now();
  const stats = {};
  let drawn = 0;
  let saved = start;
  let timer = null;
  const draw = () => {
    clearTimeout(timer);
    timer = null;
    drawn = performance.now();
    if (talk !== current) return;
    drawMessage(message);
    drawWork(running.get(talk.id));
    follow();
  };
  const drawSoon = () => { timer ??= setTimeout(draw, Math.max(drawn + DRAW_MS - performance.now(), 0)); };
  try {
    for await (const told of streamChat(body, { key: settings.key, signal: work.controller.signal })) {
      const choice = told.choices?.[0];
      const content = choice?.delta?.content;
      const reasoning = choice?.delta?.reasoning_content ?? choice?.delta?.reasoning;
      if ((content || reasoning) && !stats.first) stats.first = (performance.now() - start) / 1e3;
      if (reasoning) {
        message.reasoning = (message.reasoning ?? "") + reasoning;
        work.phase = "thinking";
      }
      if (content) {
        if (message.reasoning && !message.content) {
          stats.thinking = (performance.now() - start) / 1e3 - stats.first;
          message.stats = stats;
        }
        message.content += content;
        work.phase = "writing";
      }
      if (told.prompt_progress?.total > 0) work.progress = told.prompt_progress;
      if (told.timings) Object.assign(stats, told.timings);
      if (told.usage) {
        const { prompt_tokens, completion_tokens, prompt_tokens_details: details } = told.usage;
        Object.assign(stats, { prompt_tokens, completion_tokens });
        if (Number.isFinite(details?.cached_tokens)) stats.cached_tokens = details.cached_tokens;
      }
      if (choice?.finish_reason) message.end = choice.finish_reason;
      drawSoon();
      if (performance.now() - saved > SAVE_MS && talks.includes(talk)) {
        saved = performance.now();
        saveTalk(talk);
      }
    }
  } catch (error) {
    if (error.name === "AbortError") {
      message.end = "stopped";
    } else {
      message.error = error instanceof ApiError ? error.message : `Something went wrong: ${error.message}`;
      message.end = error.status === 401 ? "key" : "error";
      if (!(error instanceof ApiError)) console.error(error);
    }
  }
  if (Object.keys(stats).length) message.stats = stats;
  running.delete(talk.id);
  clearTimeout(timer);
  if (talks.includes(talk)) keep(talk);
  drawTalks();
  if (chosenModel()?.state === "not-loaded") refreshModels(); // it is now
  if (talk !== current) return;
  drawMessage(message);
  drawState();
  follow();
  const heard = views.get(message)?.body.innerText.slice(0, 3000) ?? "";
  announce(message.error ? `Error: ${message.error}` : message.end === "stopped" ? "Stopped" : `Answer: ${heard}`);
}

function stop() {
  running.get(current.id)?.controller.abort();
}

// ---- models and settings

let refreshes = 0;
async function refreshModels() {
  const turn = ++refreshes;
  try {
    const found = await listModels(settings.key);
    if (turn !== refreshes) return;
    models = found;
  } catch (error) {
    if (turn !== refreshes) return;
    models = [];
    drawModels();
    if (error.status === 401) {
      const text = settings.key ? "The server does not take this API key." : "The server wants an API key.";
      notice(text, "Enter the API key", openKey);
    } else {
      notice(error.message, "Try again", refreshModels);
    }
    return;
  }
  notice("");
  drawModels();
  refreshDefaults();
}

function drawModels() {
  const names = models.map((model) => model.state === "not-loaded" ? `${model.id} (not loaded)` : model.id);
  const known = Array.from(modelPicker.options, (option) => option.textContent);
  if (names.length && names.join("\n") === known.join("\n")) return;
  const chosen = settings.model;
  modelPicker.replaceChildren(...models.map((model, index) => new Option(names[index], model.id)));
  if (!models.length) modelPicker.append(new Option("No model", ""));
  modelPicker.disabled = !models.length;
  modelPicker.value = models.some((model) => model.id === chosen) ? chosen : models[0]?.id ?? "";
  drawContext();
}

async function refreshDefaults() {
  const model = modelPicker.value;
  let found = {};
  try {
    // Of models that are not loaded nothing is known yet.
    if (model && chosenModel()?.state !== "not-loaded") found = await defaults(model, settings.key);
  } catch {
    // Not all servers tell.
  }
  if (model !== modelPicker.value) return;
  ownDefaults = { ...found, max_tokens: found.max_tokens ?? found.n_predict, seed: undefined };
  for (const name of NUMBERS) byId(name).placeholder = shownDefault(name);
}

function shownDefault(name) {
  const value = ownDefaults[name];
  if (name === "seed") return "random";
  if (name === "max_tokens" && !(value > 0)) return "no limit";
  return Number.isFinite(value) ? String(Math.round(value * 1e4) / 1e4) : "";
}

function openDialog(id) {
  closeSide();
  if (!document.querySelector("dialog[open]")) byId(id).showModal();
}

function openSettings() {
  byId("system").value = current.system;
  byId("keeps-system").checked = Boolean(settings.keepsSystem);
  for (const name of NUMBERS) {
    byId(name).value = settings.sampling[name] ?? "";
    byId(name).removeAttribute("aria-invalid");
  }
  byId("thinking").value = settings.sampling.thinking ?? "";
  byId("key").value = settings.key ?? "";
  byId("colours").value = settings.theme ?? "";
  refreshDefaults();
  openDialog("settings");
}

function openKey() {
  openSettings();
  byId("key").focus();
}

function setTheme(theme) {
  settings.theme = theme;
  saveSettings(settings);
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  drawTheme();
}

function drawTheme() {
  const label = `Colours: ${THEMES[settings.theme ?? ""]}`;
  byId("theme").setAttribute("aria-label", label);
  byId("theme").title = label;
}

function closeSide() {
  byId("open-side").setAttribute("aria-expanded", "false");
  document.body.classList.remove("with-side");
}

// ---- what people do

/** The height of a field is that of its text. */
function fit(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + field.offsetHeight - field.clientHeight}px`;
}

/** Is this the key that sends? On a keyboard of glass Enter begins a line. */
function sends(event) {
  const isEnter = event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
  return isEnter && (!isTouch.matches || event.ctrlKey || event.metaKey);
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running.has(current.id)) {
    stop();
    return;
  }
  const text = box.value.trim();
  if (!text) return;
  box.value = "";
  fit(box);
  ask(text);
});

box.addEventListener("input", () => fit(box));
box.addEventListener("keydown", (event) => {
  if (sends(event)) {
    event.preventDefault();
    // While an answer comes, Enter does not stop it: the text waits.
    if (!running.has(current.id)) byId("composer").requestSubmit();
  } else if (event.key === "ArrowUp" && !box.value) {
    const index = current.messages.findLastIndex((message) => message.role === "user");
    if (index >= 0) {
      event.preventDefault();
      edit(index);
    }
  }
});
box.enterKeyHint = isTouch.matches ? "enter" : "send";

const SHORTCUTS = {
  n: startTalk,
  r: () => {
    const last = current.messages.findLastIndex((message) => message.role === "user");
    if (last >= 0) retry(last + 1);
  },
  m: () => box.focus(),
  ",": openSettings,
  "/": () => openDialog("keys"),
};

// Where Alt makes other letters of the keys (macOS), it is their places that count.
const PLACES = { KeyN: "n", KeyR: "r", KeyM: "m", Comma: ",", Slash: "/" };

function shortcut(event) {
  if (!event.altKey || event.ctrlKey || event.metaKey) return undefined;
  const key = event.key.toLowerCase();
  return SHORTCUTS[/^[!-~]$/.test(key) ? key : PLACES[event.code]];
}

document.addEventListener("keydown", (event) => {
  if (event.isComposing || document.querySelector("dialog[open]")) return;
  if (event.key === "Escape") {
    if (document.body.classList.contains("with-side")) {
      closeSide();
      byId("open-side").focus();
    } else {
      stop();
    }
  } else if (shortcut(event)) {
    event.preventDefault();
    shortcut(event)();
  }
});

document.addEventListener("click", (event) => {
  const button = event.target.closest?.(".copy-code");
  if (button) copyBy(button, button.closest(".code").querySelector("code").textContent, "Copy");
});

document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  box.focus();
});

scroller.addEventListener("scroll", () => {
  sticks = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 40;
  drawLatest();
}, { passive: true });
new ResizeObserver(follow).observe(scroller);
byId("latest").addEventListener("click", () => {
  sticks = true;
  follow();
  box.focus();
});

byId("new").addEventListener("click", startTalk);
byId("open-side").addEventListener("click", () => {
  document.body.classList.add("with-side");
  byId("open-side").setAttribute("aria-expanded", "true");
  byId("close-side").focus();
});
byId("close-side").addEventListener("click", () => {
  closeSide();
  byId("open-side").focus();
});
byId("shade").addEventListener("click", closeSide);
isNarrow.addEventListener("change", closeSide);

byId("export").addEventListener("click", () => {
  const url = URL.createObjectURL(new Blob([exportTalks()], { type: "application/json" }));
  make("a", { href: url, download: `qrun-talks-${new Date().toISOString().slice(0, 10)}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
});
byId("import").addEventListener("click", () => byId("file").click());
byId("file").addEventListener("change", async () => {
  const [file] = byId("file").files;
  byId("file").value = "";
  if (!file) return;
  try {
    const count = importTalks(await file.text());
    toast(count ? `Imported ${counted(count, "talk")}` : "All talks of the file are here already");
  } catch (error) {
    toast(error.message);
  }
  reloadTalks();
});

/** Take up what storage has, but for talks that are being answered here. */
function reloadTalks() {
  const busy = talks.filter((talk) => running.has(talk.id));
  talks = [...busy, ...loadTalks().filter((talk) => !running.has(talk.id))];
  const now = talks.find((talk) => talk.id === current.id);
  if (now && now !== current && editing === null) {
    current = now;
    drawLog();
  }
  drawTalks();
}

addEventListener("storage", (event) => {
  if (isTalkEntry(event.key)) reloadTalks();
});
addEventListener("hashchange", showLinked);
addEventListener("pagehide", () => {
  for (const talk of talks) {
    const work = running.get(talk.id);
    if (!work) continue;
    work.message.end = "stopped";
    saveTalk(talk);
  }
});
addEventListener("focus", () => {
  if (!byId("notice").hidden) refreshModels();
});

function showLinked() {
  const id = /^#talk-([\w-]+)$/.exec(location.hash)?.[1];
  const talk = id && (talks.find((one) => one.id === id) ?? loadTalk(id));
  if (talk) show(talk);
  return Boolean(talk);
}

modelPicker.addEventListener("change", () => {
  settings.model = modelPicker.value;
  saveSettings(settings);
  refreshDefaults();
  drawContext();
});
byId("open-settings").addEventListener("click", openSettings);
byId("open-keys").addEventListener("click", () => openDialog("keys"));
byId("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  setTheme(names[(names.indexOf(settings.theme ?? "") + 1) % names.length]);
  announce(byId("theme").title);
});
byId("colours").addEventListener("change", (event) => setTheme(event.target.value));
byId("system").addEventListener("input", keepSystem);
byId("keeps-system").addEventListener("change", keepSystem);
function keepSystem() {
  current.system = byId("system").value;
  settings.keepsSystem = byId("keeps-system").checked;
  settings.system = settings.keepsSystem ? current.system : "";
  saveSettings(settings);
  if (talks.includes(current)) keep(current, false);
}
for (const name of NUMBERS) {
  byId(name).addEventListener("input", ({ target }) => {
    const isGood = target.validity.valid;
    target.setAttribute("aria-invalid", String(!isGood));
    if (isGood && target.value !== "") settings.sampling[name] = target.valueAsNumber;
    else delete settings.sampling[name];
    saveSettings(settings);
  });
}
byId("thinking").addEventListener("change", ({ target }) => {
  settings.sampling.thinking = target.value;
  saveSettings(settings);
});
byId("reset").addEventListener("click", () => {
  settings.sampling = {};
  for (const name of [...NUMBERS, "thinking"]) {
    byId(name).value = "";
    byId(name).removeAttribute("aria-invalid");
  }
  saveSettings(settings);
});
byId("key").addEventListener("change", keepKey);
byId("key").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault(); // else the key presses the button that gets the focus back
  byId("settings").close();
});
byId("settings").addEventListener("close", keepKey);
function keepKey() {
  const key = byId("key").value.trim();
  if (key === (settings.key ?? "")) return;
  settings.key = key;
  saveSettings(settings);
  refreshModels();
}
for (const dialog of document.querySelectorAll("dialog")) {
  for (const button of dialog.querySelectorAll(".close")) button.addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // beside it
  });
}

drawTheme();
drawTalks();
if (!showLinked()) startTalk();
refreshModels();
