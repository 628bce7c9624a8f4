// Loads the files of an exported captioner, checked against its manifest.

const FORMAT = 1; // of manifest.json, that this page reads

/** The manifest of the captioner in a directory. */
export async function loadManifest(directory) {
  const manifest = await loadJson(`${directory}/manifest.json`);
  if (manifest?.format > FORMAT) {
    throw new Error(
      `The captioner has format ${manifest.format}, written by capdistill ${manifest.capdistill}; ` +
        `this page reads format ${FORMAT}. Write the page again with that version: ` +
        "capdistill export --web.",
    );
  }
  if (manifest?.format !== FORMAT || !manifest.files) {
    throw new Error(
      `${directory}/manifest.json does not describe an exported captioner. Write the page again.`,
    );
  }
  return manifest;
}

/** The bytes of a file that the manifest lists.
 *
 * @param {function(number): void} onBytes - Is told how many more bytes have arrived.
 */
export async function loadListed(directory, manifest, name, onBytes = () => {}) {
  const entry = manifest.files[name];
  const path = `${directory}/${name}`;
  if (!entry) throw new Error(`${directory}/manifest.json does not list ${name}.`);
  const response = await get(path);
  const bytes = new Uint8Array(entry.bytes);
  const reader = response.body.getReader();
  let length = 0;
  for (let part = await read(reader, path); part; part = await read(reader, path)) {
    if (length + part.length <= bytes.length) bytes.set(part, length);
    length += part.length;
    onBytes(part.length);
  }
  if (length !== entry.bytes) {
    throw new Error(`${path} has ${length} bytes, but ${entry.bytes} were exported. ${AGAIN}`);
  }
  if (globalThis.crypto?.subtle && (await sha256(bytes)) !== entry.sha256) {
    throw new Error(`${path} has changed since it was exported: its checksum is wrong. ${AGAIN}`);
  }
  return bytes; // browsers offer checksums on https and on localhost only
}

const AGAIN = "Copy it to the server again.";

/** The values in a JSON file that the manifest lists. */
export async function loadListedJson(directory, manifest, name) {
  const bytes = await loadListed(directory, manifest, name);
  return JSON.parse(new TextDecoder().decode(bytes));
}

/** The values in a JSON file. */
export async function loadJson(path) {
  const response = await get(path, "no-store"); // says what the other files are, so is never old
  try {
    return await response.json();
  } catch {
    throw new Error(`${path} is not valid JSON. ${AGAIN}`);
  }
}

async function get(path, cache = "no-cache") { // asks whether the file has changed
  let response;
  try {
    response = await fetch(path, { cache });
  } catch {
    throw new Error(`${path} cannot be loaded. Is the device online, and the server running?`);
  }
  if (response.ok) return response;
  throw new Error(`${path} cannot be loaded: the server answers ${response.status}. ${AGAIN}`);
}

async function read(reader, path) {
  try {
    return (await reader.read()).value;
  } catch {
    throw new Error(`${path}: the connection was lost. Reload the page.`);
  }
}

async function sha256(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** The bytes of a file of onnxruntime-web, which must have the hash that page.json states. */
export async function loadTrusted({ url, integrity }) {
  for (const cache of ["default", "reload"]) {
    try {
      const response = await fetch(url, { integrity, cache });
      if (response.ok) return await response.arrayBuffer();
    } catch {
      // offline, or another file than the one that is trusted: browsers do not tell
    }
  }
  throw new Error(
    `${url} cannot be loaded, or is not the file that this page expects. To do without the network, ` +
      "write the page with the files of onnxruntime-web: capdistill export --web DIR --ort DIR.",
  );
}
