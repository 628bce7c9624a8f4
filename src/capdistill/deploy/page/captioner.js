// A captioner in the browser: `const captioner = await loadCaptioner()`, then
// `for await (const text of captioner.caption(photo)) ...`, one word more each time.

import { loadJson, loadListed, loadListedJson, loadManifest, loadTrusted } from "./files.js";
import { nextId } from "./greedy.js";
import { readPhoto } from "./pixels.js";
import { makeDecoder } from "./text.js";

const DIRECTORY = "model";
const GRAPHS = ["encoder.onnx", "step.onnx"];
const SIMD = Uint8Array.of( // the smallest module with an instruction of SIMD
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15,
  253, 98, 11,
);

/** Load onnxruntime-web and the captioner beside this page.
 *
 * @param {function(number): void} onProgress - Is told the share that has arrived, from 0 to 1.
 */
export async function loadCaptioner(onProgress = () => {}) {
  requireBrowser();
  const page = await loadJson("page.json");
  const manifest = await loadManifest(DIRECTORY);
  const ort = await loadRuntime(page.onnxruntime);
  const spec = await loadListedJson(DIRECTORY, manifest, "generation.json");
  const decode = makeDecoder(await loadListedJson(DIRECTORY, manifest, "tokenizer.json"));
  const total = GRAPHS.reduce((sum, name) => sum + (manifest.files[name]?.bytes ?? 0), 0);
  let arrived = 0;
  const sessions = [];
  for (const name of GRAPHS) {
    const bytes = await loadListed(DIRECTORY, manifest, name, (count) => {
      arrived += count;
      onProgress(arrived / total);
    });
    sessions.push(await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] }));
  }
  return new Captioner(ort, manifest, spec, decode, ...sessions);
}

/** Throws where the browser lacks what the captioner needs. */
function requireBrowser() {
  const needed = {
    "WebAssembly with SIMD": globalThis.WebAssembly?.validate(SIMD),
    OffscreenCanvas: globalThis.OffscreenCanvas,
  };
  for (const name of Object.keys(needed).filter((each) => !needed[each])) {
    throw new Error(
      `This browser has no ${name}, or does not allow it on this page. Use a browser of 2024 or ` +
        "later; a phone in Lockdown Mode can exclude the page from it.",
    );
  }
}

async function loadRuntime({ module, wasm }) {
  const [script, binary] = await Promise.all([loadTrusted(module), loadTrusted(wasm)]);
  const url = URL.createObjectURL(new Blob([script], { type: "text/javascript" }));
  try {
    const ort = await import(url);
    ort.env.wasm.wasmBinary = binary;
    ort.env.wasm.numThreads = 1; // more need a server that isolates the page
    return ort;
  } finally {
    URL.revokeObjectURL(url);
  }
}

class Captioner {
  constructor(ort, manifest, spec, decode, encoder, step) {
    Object.assign(this, { ort, manifest, spec, decode, encoder, step });
    this.name = manifest.name;
  }

  /** The caption of an image file, as it grows by one word or piece at a time.
   *
   * @param {Blob} photo - An image in any format that the browser reads.
   */
  async *caption(photo) {
    yield* this.captionPixels(await readPhoto(photo, this.manifest.image.size));
  }

  /** As `caption`, of (3, S, S) bytes. */
  async *captionPixels(pixels) {
    const { ort, spec, manifest } = this;
    const size = manifest.image.size;
    const first = await this.encoder.run({
      images: new ort.Tensor("uint8", pixels, [1, 3, size, size]),
    });
    const state = {};
    for (const name of manifest.image_inputs) state[name] = first[name];
    for (const name of manifest.state) state[name] = oneBeam(ort, first[name]);
    const ids = [];
    let read = spec.start_id;
    while (ids.length < spec.max_length) {
      const tokens = new ort.Tensor("int64", BigInt64Array.of(BigInt(read)), [1, 1]);
      const position = new ort.Tensor("int64", BigInt64Array.of(BigInt(ids.length)), []);
      const { logits, ...changed } = await this.step.run({ tokens, position, ...state });
      for (const name of Object.keys(state)) state[name] = changed[`next_${name}`] ?? state[name];
      read = nextId(logits.data, ids, spec);
      if (read === spec.end_id) break;
      ids.push(read);
      yield this.decode(ids);
    }
  }
}

/** (I, ...) to (I, 1, ...). */
function oneBeam(ort, { type, data, dims: [images, ...rest] }) {
  return new ort.Tensor(type, data, [images, 1, ...rest]);
}
