// Markdown to elements. Only elements and text nodes are made, never HTML from a string: tags in the text stay text,
// links lead to the web or to mail only, and images are links, so that nothing is fetched by showing a message.

const MAX_DEPTH = 8;
const FENCE = /^( {0,3})(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}>/;
const ITEM = /^( *)([-*+]|(\d{1,9})[.)])(?:( +)(?=\S)|[ \t]*$)/;
const TABLE = /^\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?$/;
const MATH_BEGIN = /^ {0,3}(\\\[|\$\$)/;

const sources = new WeakMap(); // of elements that stand for blocks

/** Show a text in an element. Blocks that are as they were keep their elements: an answer that grows is drawn at its
 * end only, and what is selected or focused stays so. */
export function showMarkdown(element, text) {
  const blocks = parse(text.replaceAll("\r\n", "\n").split("\n"));
  let old = element.firstElementChild;
  for (const block of blocks) {
    const next = old?.nextElementSibling;
    const was = old && sources.get(old);
    if (was?.kind === "code" && block.kind === "code" && was.language === block.language) {
      if (was.code !== block.code) old.querySelector("code").textContent = block.code;
      sources.set(old, block);
    } else if (was?.kind !== block.kind || was.source !== block.source) {
      const made = draw(block, 0);
      sources.set(made, block);
      if (old) old.replaceWith(made);
      else element.append(made);
    }
    old = next;
  }
  while (old) {
    const next = old.nextElementSibling;
    old.remove();
    old = next;
  }
}

/** The blocks that some lines are made of. */
function parse(lines) {
  const blocks = [];
  const unclosed = new Set(); // marks of formulas that nothing closes from here on
  let at = 0;
  const add = (end, block) => {
    block.source = lines.slice(at, end).join("\n");
    blocks.push(block);
    at = end;
  };
  while (at < lines.length) {
    const line = lines[at];
    let match;
    if (!line.trim()) {
      at++;
    } else if ((match = FENCE.exec(line))) {
      const [, indent, fence, info] = match;
      let end = at + 1;
      while (end < lines.length && !closes(lines[end], fence)) end++;
      const code = lines.slice(at + 1, end).map((one) => stripped(one, indent.length)).join("\n");
      add(Math.min(end + 1, lines.length), { kind: "code", code, language: info.trim().split(/\s/, 1)[0] });
    } else if ((match = MATH_BEGIN.exec(line))) {
      const mark = match[1] === "$$" ? "$$" : "\\]";
      let end = unclosed.has(mark) ? lines.length : at;
      let from = match[0].length;
      while (end < lines.length && !lines[end].includes(mark, from)) {
        end++;
        from = 0;
      }
      if (end === lines.length) unclosed.add(mark);
      if (end === lines.length || lines[end].slice(lines[end].indexOf(mark, from) + 2).trim()) {
        add(at + 1, { kind: "paragraph", lines: [line] });
      } else {
        const whole = lines.slice(at, end + 1).join("\n").trim();
        add(end + 1, { kind: "math", code: whole.slice(2, -2).trim() });
      }
    } else if ((match = HEADING.exec(line))) {
      const text = (match[2] ?? "").trim().replace(/(?:^|[ \t])#+$/, "");
      add(at + 1, { kind: "heading", level: match[1].length, text });
    } else if (RULE.test(line)) {
      add(at + 1, { kind: "rule" });
    } else if (QUOTE.test(line)) {
      let end = at + 1;
      while (end < lines.length && (QUOTE.test(lines[end]) || !startsBlock(lines, end))) end++;
      add(end, { kind: "quote", lines: lines.slice(at, end).map((one) => one.replace(/^ {0,3}> ?/, "")) });
    } else if (ITEM.test(line)) {
      const { end, list } = parseList(lines, at);
      add(end, list);
    } else if (isTable(lines, at)) {
      let end = at + 2;
      while (end < lines.length && lines[end].includes("|") && lines[end].trim()) end++;
      const align = cells(lines[at + 1]).map(alignment);
      add(end, { kind: "table", align, rows: [lines[at], ...lines.slice(at + 2, end)].map(cells) });
    } else {
      let end = at + 1;
      while (end < lines.length && !startsBlock(lines, end)) end++;
      add(end, { kind: "paragraph", lines: lines.slice(at, end) });
    }
  }
  return blocks;
}

function closes(line, fence) {
  const text = line.trim();
  return text.length >= fence.length && text === fence[0].repeat(text.length);
}

/** A line without up to so many spaces at its beginning. */
function stripped(line, count) {
  let start = 0;
  while (start < count && line[start] === " ") start++;
  return line.slice(start);
}

function startsBlock(lines, at) {
  const line = lines[at];
  return !line.trim() || FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) ||
    ITEM.test(line) || MATH_BEGIN.test(line) || isTable(lines, at);
}

function isTable(lines, at) {
  const next = lines[at + 1]?.trim();
  return next !== undefined && lines[at].includes("|") && next.includes("-") && TABLE.test(next) &&
    cells(lines[at]).length === cells(next).length;
}

function cells(line) {
  const text = line.trim().replace(/^\|/, "").replace(/(^|[^\\])\|$/, "$1");
  return text.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function alignment(cell) {
  const left = cell.startsWith(":");
  const right = cell.endsWith(":");
  return left && right ? "center" : right ? "right" : "";
}

/** Models indent what is in an item by two spaces, or by the width of its marker: two are enough here. */
function parseList(lines, at) {
  const [, margin, , number] = ITEM.exec(lines[at]);
  const ordered = number !== undefined;
  const list = { kind: "list", ordered, start: ordered ? Number(number) : 1, tight: true, items: [] };
  let item;
  let wasBlank = false;
  let end = at;
  for (; end < lines.length; end++) {
    const line = lines[end];
    if (!line.trim()) {
      wasBlank = true;
      item.lines.push("");
      continue;
    }
    const indent = line.length - line.trimStart().length;
    const match = ITEM.exec(line);
    if (match && indent < margin.length + 2 && !RULE.test(line)) {
      if ((match[3] !== undefined) !== ordered || indent < margin.length) break;
      if (wasBlank && item) list.tight = false;
      const width = match[0].length;
      item = { width: Math.min(width, indent + 4), lines: [line.slice(width)] };
      list.items.push(item);
    } else if (indent >= margin.length + 2) {
      if (wasBlank) list.tight = false;
      item.lines.push(stripped(line, item.width));
    } else if (!wasBlank && !startsBlock(lines, end)) {
      item.lines.push(line.trimStart());
    } else {
      break;
    }
    wasBlank = false;
  }
  while (end > at && !lines[end - 1].trim()) end--;
  return { end, list };
}

function make(name, ...children) {
  const element = document.createElement(name);
  element.append(...children);
  return element;
}

/** The element of a block. */
function draw(block, depth) {
  switch (block.kind) {
    case "code":
      return drawCode(block);
    case "math": {
      const made = make("pre", make("code", block.code));
      made.className = "math";
      made.tabIndex = 0;
      return made;
    }
    case "heading":
      // The page's own headings are of the levels 1 and 2.
      return make(`h${Math.min(block.level + 2, 6)}`, inline(block.text));
    case "rule":
      return make("hr");
    case "quote":
      return make("blockquote", ...drawAll(block.lines, depth + 1));
    case "list": {
      const made = make(block.ordered ? "ol" : "ul", ...block.items.map((item) => drawItem(item, depth)));
      if (block.ordered && block.start !== 1) made.start = block.start;
      if (block.tight) made.className = "tight";
      return made;
    }
    case "table":
      return drawTable(block);
    default:
      return make("p", inline(block.lines.map((line) => line.trimStart()).join("\n").trimEnd()));
  }
}

function drawAll(lines, depth) {
  if (depth > MAX_DEPTH) return [make("p", lines.join("\n"))];
  return parse(lines).map((block) => draw(block, depth));
}

function drawItem(item, depth) {
  const task = /^\[([ xX])\] /.exec(item.lines[0]);
  const lines = task ? [`${task[1] === " " ? "☐" : "☑"} ${item.lines[0].slice(4)}`, ...item.lines.slice(1)] : item.lines;
  return make("li", ...drawAll(lines, depth + 1));
}

function drawCode(block) {
  const name = make("span", block.language);
  const button = make("button", "Copy");
  button.type = "button";
  button.className = "copy-code";
  button.setAttribute("aria-label", "Copy the code");
  const bar = make("div", name, button);
  bar.className = "bar";
  const pre = make("pre", make("code", block.code));
  pre.tabIndex = 0; // so that the keyboard can scroll it
  const made = make("div", bar, pre);
  made.className = "code";
  return made;
}

function drawTable(block) {
  const row = (texts, name) => make("tr", ...block.align.map((align, index) => {
    const cell = make(name, inline(texts[index] ?? ""));
    if (align) cell.className = align;
    return cell;
  }));
  const [head, ...rest] = block.rows;
  const table = make("table", make("thead", row(head, "th")), make("tbody", ...rest.map((texts) => row(texts, "td"))));
  const made = make("div", table);
  made.className = "table";
  made.tabIndex = 0;
  return made;
}

const LINK = /!?\[((?:[^[\]\\]|\\.|\[[^[\]]{0,200}\]){0,1000})\]\(\s{0,9}<?((?:[^()\s<>]|\([^()\s<>]{0,500}\)){0,2000})>?(?:\s{1,9}(?:"[^"]{0,500}"|'[^']{0,500}'))?\s{0,9}\)/y;
const BARE = /(?:https?:\/\/|mailto:)[^\s<>"`|\\]+/y;
const ANGLE = /<((?:https?:\/\/|mailto:)[^\s<>]+)>/y;
const BREAK = /<br ?\/?>/iy;
const ENTITY = /&(?:amp|lt|gt|quot|apos|nbsp|#39);/y;
const ENTITIES = { "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": "\"", "&apos;": "'", "&#39;": "'", "&nbsp;": "\u00a0" };
const MATH = /\\\((.{1,2000}?)\\\)/sy;
const PLAIN = /[^\\`*_~[!<&hm\n]+/y;
const PUNCTUATION = /[\p{P}\p{S}]/u;

function sticky(pattern, text, at) {
  pattern.lastIndex = at;
  return pattern.exec(text);
}

/** The nodes of a text within a block. inLink: links have no links in them. */
function inline(text, inLink = false) {
  const items = [];
  const unclosed = new Set(); // lengths of runs of backticks that nothing closes
  let plain = "";
  const flush = () => {
    if (plain) items.push({ node: document.createTextNode(plain) });
    plain = "";
  };
  const put = (node) => {
    flush();
    items.push({ node });
  };
  for (let at = 0; at < text.length;) {
    const letter = text[at];
    let match;
    if ((match = sticky(PLAIN, text, at))) {
      plain += match[0];
      at += match[0].length;
    } else if (letter === "\\" && (match = sticky(MATH, text, at))) {
      const made = make("code", match[1]);
      made.className = "math";
      put(made);
      at += match[0].length;
    } else if (letter === "\\" && at + 1 < text.length && /[!-/:-@[-`{-~\n]/.test(text[at + 1])) {
      if (text[at + 1] === "\n") put(make("br"));
      else plain += text[at + 1];
      at += 2;
    } else if (letter === "\n") {
      // Models break lines where they mean it.
      plain = plain.trimEnd();
      put(make("br"));
      at++;
    } else if (letter === "`") {
      const length = run(text, at);
      const end = unclosed.has(length) ? -1 : closing(text, at + length, length);
      if (end < 0) {
        unclosed.add(length);
        plain += text.slice(at, at + length);
        at += length;
      } else {
        let code = text.slice(at + length, end).replaceAll("\n", " ");
        if (code.startsWith(" ") && code.endsWith(" ") && code.trim()) code = code.slice(1, -1);
        put(make("code", code));
        at = end + length;
      }
    } else if (letter === "*" || letter === "_" || letter === "~") {
      flush();
      const length = run(text, at);
      items.push(delimiter(text, at, length));
      at += length;
    } else if (!inLink && (letter === "[" || letter === "!") && (match = sticky(LINK, text, at))) {
      put(link(match[2], match[1] ? inline(match[1], true) : match[2]));
      at += match[0].length;
    } else if (!inLink && (match = sticky(ANGLE, text, at))) {
      put(link(match[1], match[1]));
      at += match[0].length;
    } else if ((match = sticky(BREAK, text, at))) {
      put(make("br"));
      at += match[0].length;
    } else if ((match = sticky(ENTITY, text, at))) {
      plain += ENTITIES[match[0]];
      at += match[0].length;
    } else if (!inLink && !/\w/.test(text[at - 1] ?? " ") && (match = sticky(BARE, text, at))) {
      const address = bare(match[0]);
      put(link(address, address));
      at += address.length;
    } else {
      plain += letter;
      at++;
    }
  }
  flush();
  emphasise(items);
  const made = document.createDocumentFragment();
  made.append(...items.map(nodeOf));
  return made;
}

/** How many letters from here are the same. */
function run(text, at) {
  let end = at + 1;
  while (text[end] === text[at]) end++;
  return end - at;
}

/** Where the run of backticks begins that closes a span of code, or -1. */
function closing(text, at, length) {
  for (let found = text.indexOf("`", at); found >= 0; found = text.indexOf("`", found)) {
    const count = run(text, found);
    if (count === length) return found;
    found += count;
  }
  return -1;
}

/** An address in running text, without the punctuation that ends the sentence. */
function bare(address) {
  for (;;) {
    const last = address.at(-1);
    const isOpen = last === ")" && address.split("(").length >= address.split(")").length;
    if (isOpen || !/[.,;:!?)\]*_~'"]/.test(last)) return address;
    address = address.slice(0, -1);
  }
}

function link(address, content) {
  let url;
  try {
    url = new URL(address);
  } catch {
    url = null;
  }
  if (!url || !["http:", "https:", "mailto:"].includes(url.protocol)) return make("span", content);
  const made = make("a", content);
  made.href = url.href;
  made.target = "_blank";
  made.rel = "noopener noreferrer nofollow";
  return made;
}

/** A run of *, _ or ~, and whether it may open or close emphasis (CommonMark, 6.2). */
function delimiter(text, at, count) {
  const mark = text[at];
  const before = text[at - 1] ?? " ";
  const after = text[at + count] ?? " ";
  const isSpace = (letter) => !letter.trim();
  const leftFlanking = !isSpace(after) && (!PUNCTUATION.test(after) || isSpace(before) || PUNCTUATION.test(before));
  const rightFlanking = !isSpace(before) && (!PUNCTUATION.test(before) || isSpace(after) || PUNCTUATION.test(after));
  let open = leftFlanking;
  let close = rightFlanking;
  if (mark === "_") {
    open = leftFlanking && (!rightFlanking || PUNCTUATION.test(before));
    close = rightFlanking && (!leftFlanking || PUNCTUATION.test(after));
  } else if (mark === "~" && count !== 2) {
    open = close = false;
  }
  return { mark, count, length: count, open, close };
}

/** Put what stands between runs that belong together into elements (CommonMark, "process emphasis"). */
function emphasise(items) {
  const bottoms = new Map(); // below which there is no opener for a kind of closer
  for (let at = 0; at < items.length; at++) {
    const closer = items[at];
    if (!closer.mark || !closer.close || !closer.count) continue;
    const kind = `${closer.mark}${closer.open}${closer.length % 3}`;
    const bottom = bottoms.get(kind) ?? 0;
    let from = at - 1;
    while (from >= bottom && !belong(items[from], closer)) from--;
    if (from < bottom) {
      bottoms.set(kind, at);
      continue;
    }
    const opener = items[from];
    const count = opener.count >= 2 && closer.count >= 2 ? 2 : 1;
    const made = make(closer.mark === "~" ? "del" : count === 2 ? "strong" : "em");
    made.append(...items.splice(from + 1, at - from - 1, { node: made }).map(nodeOf));
    opener.count -= count;
    closer.count -= count;
    for (const [name, value] of bottoms) if (value > from + 1) bottoms.set(name, from + 1);
    at = from + 1; // the closer is next, once more
  }
}

function belong(opener, closer) {
  if (opener.mark !== closer.mark || !opener.open || !opener.count) return false;
  const isOdd = (opener.close || closer.open) && (opener.length + closer.length) % 3 === 0;
  return !isOdd || (opener.length % 3 === 0 && closer.length % 3 === 0);
}

function nodeOf(item) {
  return item.node ?? document.createTextNode(item.mark.repeat(item.count));
}
