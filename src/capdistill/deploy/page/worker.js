// Runs the captioner beside the page, which stays responsive meanwhile.

import { loadCaptioner } from "./captioner.js";

const loaded = loadCaptioner((share) => postMessage({ share }));
let latest = 0; // number of the photo that is wanted; an earlier one is given up

loaded.then(
  ({ name }) => postMessage({ ready: name }),
  (error) => postMessage({ failed: error.message }),
);

onmessage = async ({ data: { number, photo } }) => {
  latest = number;
  try {
    const captioner = await loaded.catch(() => null);
    if (!captioner || number !== latest) return;
    const began = performance.now();
    let text = "";
    for await (text of captioner.caption(photo)) {
      postMessage({ number, text });
      await new Promise((resume) => setTimeout(resume)); // lets the next photo come in
      if (number !== latest) return;
    }
    postMessage({ number, text, seconds: (performance.now() - began) / 1000 });
  } catch (error) {
    const unreadable = error.name === "InvalidStateError" || error.name === "EncodingError";
    const advice =
      "This browser cannot read the file as an image. Save it as JPEG or PNG; few browsers read HEIC.";
    postMessage({ number, unreadable: unreadable ? advice : error.message });
  }
};
