// The same as sidecar.py in a program for Node, and so for Electron: start a server, ask it, never leave it behind.
//
//     pip install 'qrun-gguf[server]'
//     node sidecar.mjs model.gguf "Why is the sky blue?"
//
// QRUN names the command where it is not on the path.

import { spawn } from "node:child_process";
import { randomBytes } from "node:crypto";
import { createInterface } from "node:readline";

const [model, question] = process.argv.slice(2);
const key = randomBytes(24).toString("base64url");
const child = spawn(
  process.env.QRUN ?? "qrun",
  ["serve", model, "--port", "0", "--ready-json", "--exit-with-stdin", "--quiet"],
  // Its standard input is a pipe whose other end is here: it ends when this process does, however that ends.
  { stdio: ["pipe", "pipe", "pipe"], env: { ...process.env, QRUN_API_KEY: key }, windowsHide: true },
);
let said = "";
child.stderr.setEncoding("utf8").on("data", (text) => (said = (said + text).slice(-10_000)));

const url = await new Promise((resolve, reject) => {
  child.on("error", reject);
  child.on("close", () => reject(new Error(said.trim().split("\n").at(-1) || "qrun ended without a word")));
  createInterface({ input: child.stdout }).once("line", (line) => resolve(JSON.parse(line).url));
}).catch((error) => {
  console.error(error.message);
  process.exit(1);
});

const answer = await fetch(`${url}/v1/chat/completions`, {
  method: "POST",
  headers: { "Content-Type": "application/json", Authorization: `Bearer ${key}` },
  body: JSON.stringify({ messages: [{ role: "user", content: question }], max_tokens: 300, stream: true }),
});
if (!answer.ok) {
  console.error((await answer.json()).error.message);
  process.exit(1);
}
let rest = "";
for await (const part of answer.body.pipeThrough(new TextDecoderStream())) {
  const lines = (rest + part).split("\n");
  rest = lines.pop();
  for (const line of lines) {
    if (line.startsWith("data: ") && line !== "data: [DONE]") {
      for (const choice of JSON.parse(line.slice(6)).choices) process.stdout.write(choice.delta.content ?? "");
    }
  }
}
process.stdout.write("\n");
child.stdin.end();
