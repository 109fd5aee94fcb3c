// The server's interface: OpenAI's, with llama-server's timings and progress of the prompt.

export class ApiError extends Error {
  /** status: of HTTP, 0 where there was no answer. */
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function request(path, { key, ...options }) {
  try {
    return await fetch(path, { ...options, headers: { ...options.headers, ...headers(key) } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (error instanceof TypeError && key && /[^\x20-\x7e]/.test(key)) {
      throw new ApiError("The API key has characters that no key can have.", 401);
    }
    throw new ApiError("The server cannot be reached. Is it running?");
  }
}

/** What the server says of an error, whatever form it has. */
async function failure(response) {
  let message = "";
  try {
    const text = await response.text();
    try {
      message = said(JSON.parse(text));
    } catch {
      if (!/^\s*</.test(text)) message = text.trim().slice(0, 500);
    }
  } catch {
    // The connection broke: the status has to do.
  }
  const wait = response.headers.get("retry-after");
  message ||= `The server answered ${response.status} ${response.statusText}`.trim();
  if (response.status === 503 && wait) message += ` (try again in ${wait} s)`;
  return new ApiError(message, response.status);
}

function said(body) {
  const error = body?.error ?? body?.detail ?? body?.message ?? body;
  const message = typeof error === "string" ? error : error?.message;
  return typeof message === "string" && message ? message : JSON.stringify(error).slice(0, 500);
}

async function getJSON(path, key) {
  const response = await request(path, { key });
  if (!response.ok) throw await failure(response);
  try {
    return await response.json();
  } catch {
    throw new ApiError(`The answer of ${path} is not JSON.`, response.status);
  }
}

export async function listModels(key) {
  const data = (await getJSON("v1/models", key)).data;
  return Array.isArray(data) ? data.filter((model) => typeof model?.id === "string") : [];
}

/** The model's own sampling, by the names of the fields; empty where it is not known. */
export async function defaults(model, key) {
  const told = await getJSON(`props?model=${encodeURIComponent(model)}`, key);
  return told.default_generation_settings?.params ?? {};
}

/** The objects of a streamed answer, as they come. Ends without an error only if the server has said that it is done. */
export async function* streamChat(body, { key, signal }) {
  const response = await request("v1/chat/completions", {
    key,
    signal,
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
  });
  if (!response.ok) throw await failure(response);
  let isDone = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") {
      isDone = true;
      continue;
    }
    let told;
    try {
      told = JSON.parse(data);
    } catch {
      throw new ApiError("The server sent something that is not JSON.");
    }
    if (told.error) throw new ApiError(said(told), Number(told.error.code) || 0);
    if (told.choices?.[0]?.finish_reason) isDone = true;
    yield told;
  }
  if (!isDone) throw new ApiError("The connection broke before the answer was complete.");
}

/** The data of server-sent events. */
async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ApiError("The connection broke before the answer was complete.");
      }
      const lines = (rest + decoder.decode(part.value, { stream: !part.done })).split(/\r\n|\n|\r(?!$)/);
      rest = part.done ? "" : lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        }
      }
      if (part.done) {
        if (data.length) yield data.join("\n");
        return;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
