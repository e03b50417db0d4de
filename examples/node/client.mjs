// Loads a model, draws one image and unloads it again, written from docs/protocol.md alone.
//
//   npm install
//   node client.mjs ipc:///run/gpuctl/gpuctl.sock shapes "a large red circle on a blue background" out.png

import { randomBytes } from "node:crypto";
import { writeFile } from "node:fs/promises";
import { decode, encode } from "@msgpack/msgpack";
import { Dealer } from "zeromq";

const VERSION = "gpuctl/1";

/** Sends one request and resolves with its answer; events go to stderr as they come. */
async function ask(socket, request) {
  const id = randomBytes(16).toString("hex");
  await socket.send([VERSION, encode({ id, ...request })]);
  for await (const [version, map, ...blobs] of socket) {
    if (version.toString() !== VERSION) throw new Error(`the daemon speaks ${version}`);
    const message = decode(map);
    if (message.id !== id) continue;
    if ("ok" in message) return finish(message, blobs);
    if (message.event === "job") console.error(`step ${message.step} of ${message.steps}`);
  }
}

function finish(answer, blobs) {
  if (!answer.ok) throw new Error(`${answer.error.message} (${answer.error.hint})`);
  return { answer, blobs };
}

const [endpoint, model, prompt, path] = process.argv.slice(2);
const socket = new Dealer({ linger: 0 });
socket.connect(endpoint);

await ask(socket, { op: "load", model });
const drawn = await ask(socket, { op: "generate", model, params: { prompt }, seed: 7, progress: true });
const [image] = drawn.answer.images;
await writeFile(path, drawn.blobs[image.blob]);
const freed = await ask(socket, { op: "unload", model });
const bytes = freed.answer.workers.reduce((sum, row) => sum + row.freed_bytes, 0);
console.log(`${path}: ${image.width}x${image.height}, seed ${image.seed}; then freed ${bytes} bytes`);
socket.close();
