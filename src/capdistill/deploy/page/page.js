// The page: takes photos, hands them to the worker and shows the words that come back.

import { offerCamera } from "./camera.js";

const element = (id) => document.getElementById(id);
let number = 0; // of the photo that is shown
let ready = false;
let failure = null; // why there is no captioner

/** Show a photo and have it captioned. */
async function show(photo) {
  number += 1;
  const mine = number;
  URL.revokeObjectURL(element("photo").src);
  element("photo").src = URL.createObjectURL(photo);
  element("photo").alt = "Your photo";
  element("result").hidden = false;
  for (const id of ["caption", "time", "spoken"]) element(id).textContent = "";
  if (failure) return say(failure, true);
  say(ready ? "Looking …" : "The photo is captioned as soon as the captioner is loaded.");
  (await worker)?.postMessage({ number: mine, photo });
}

/** Say why photos cannot be captioned, now and for every later photo. */
function fail(reason) {
  failure = reason;
  element("loading").hidden = true;
  say(reason, true);
}

function say(text, isError = false) {
  element("status").textContent = text;
  element("status").classList.toggle("error", isError);
}

function onMessage({ data }) {
  if ("share" in data) element("progress").value = data.share;
  if ("failed" in data) fail(data.failed);
  if ("ready" in data) {
    ready = true;
    element("loading").hidden = true;
    element("name").textContent = data.ready;
    say(number ? "Looking …" : "Ready.");
  }
  if (data.number !== number) return;
  if ("unreadable" in data) {
    element("result").hidden = true;
    say(data.unreadable, true);
  }
  if ("text" in data) element("caption").textContent = data.text;
  if ("seconds" in data) {
    say("");
    element("photo").alt = data.text;
    element("spoken").textContent = data.text || "No words were found.";
    element("time").textContent = `Found in ${data.seconds.toFixed(2)} seconds`;
  }
}

async function startWorker() {
  say("Loading the captioner …");
  element("loading").hidden = false;
  await keepOffline();
  try {
    const made = new Worker("worker.js", { type: "module" });
    made.onmessage = onMessage;
    made.onerror = (event) => fail(cannotStart(event.message));
    return made;
  } catch (error) {
    return fail(cannotStart(error.message));
  }
}

/** Browsers do not say which script of a worker is missing. */
function cannotStart(cause) {
  return (
    `The captioner cannot run (${cause || "one of its scripts cannot be loaded"}). Copy all files ` +
    "of the page to the server again, or use a browser of 2024 or later."
  );
}

/** Let a service worker keep the files, for visits without a network. */
async function keepOffline() {
  const keeper = navigator.serviceWorker; // browsers have it on https and on localhost only
  if (!keeper || keeper.controller) return;
  const controlled = new Promise((resume) => (keeper.oncontrollerchange = resume));
  const patience = new Promise((resume) => setTimeout(resume, 2000));
  try {
    await keeper.register("offline.js");
    await Promise.race([controlled, patience]);
  } catch {
    // the page works without it while there is a network
  }
}

for (const input of [element("file"), element("capture")]) {
  input.onchange = () => {
    if (input.files.length) show(input.files[0]);
    input.value = ""; // the same file can be chosen again
  };
}
element("choose").onclick = () => element("file").click();
offerCamera({ button: element("take"), input: element("capture"), dialog: element("camera") }, show);

for (const kind of ["dragenter", "dragover"]) {
  addEventListener(kind, (event) => {
    event.preventDefault();
    element("area").classList.add("over");
  });
}
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) element("area").classList.remove("over");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  element("area").classList.remove("over");
  const [file] = event.dataTransfer.files;
  if (file) show(file);
  else say("This is not a file. Drop a photo from a folder.", true);
});
addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) show(event.clipboardData.files[0]);
});

const worker = startWorker();
