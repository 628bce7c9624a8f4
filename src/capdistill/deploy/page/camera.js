// Takes a photo: with the camera app of a phone, or with the camera of a computer.

/** Let a button take photos; it stays hidden where that is impossible.
 *
 * @param {object} parts - The elements: `button`, `input` (a file input that opens a phone's
 *     camera), and `dialog`, which holds a video and a form that is submitted to take the photo.
 * @param {function(Blob): void} onPhoto - Is given the photo.
 */
export function offerCamera({ button, input, dialog }, onPhoto) {
  const isPhone = matchMedia("(hover: none) and (pointer: coarse)").matches;
  if (!isPhone && !navigator.mediaDevices?.getUserMedia) return;
  button.hidden = false;
  button.onclick = () => (isPhone ? input.click() : open(dialog, onPhoto));
}

async function open(dialog, onPhoto) {
  const video = dialog.querySelector("video");
  const status = dialog.querySelector("[role=status]");
  status.textContent = "Starting the camera …";
  dialog.showModal();
  let stream = null;
  dialog.onclose = async () => {
    if (dialog.returnValue === "take" && video.videoWidth) onPhoto(await grab(video));
    for (const track of stream?.getTracks() ?? []) track.stop();
    video.srcObject = null;
    dialog.returnValue = "";
  };
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { width: 1280 } });
  } catch (error) {
    const refused = error.name === "NotAllowedError";
    status.textContent = refused
      ? "The browser may not use the camera. Allow it in the settings of this page."
      : `The camera cannot be used (${error.message}).`;
    return;
  }
  video.srcObject = stream;
  await video.play();
  status.textContent = "";
  if (!dialog.open) for (const track of stream.getTracks()) track.stop();
}

async function grab(video) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  canvas.getContext("2d").drawImage(video, 0, 0);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}
