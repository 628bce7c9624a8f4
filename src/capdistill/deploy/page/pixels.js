// The square that a captioner sees, pixel for pixel as Python cuts it (capdistill.data.pixels):
// the largest centred square, resized by an antialiased triangle filter in 8-bit arithmetic.
// Browsers shrink images by filters of their own, which would give other pixels and other captions.

/** The pixels of a photo as (3, size, size) bytes: all red ones, then green, then blue.
 *
 * @param {number} width, height - Of the photo, in pixels.
 * @param {number} size - Side of the square.
 * @param {function(number, number, number, number): Uint8ClampedArray} read - Is given left, top,
 *     columns and rows, and returns those pixels of the photo as RGBA, row by row.
 */
export function centreSquare(width, height, size, read) {
  const side = Math.min(width, height);
  const left = Math.floor((width - side) / 2);
  const top = Math.floor((height - side) / 2);
  const filter = side === size ? null : makeFilter(side, size);
  const narrow = new Uint8Array(side * size * 3); // every row of the square, size pixels wide
  const strip = Math.max(1, Math.floor(2 ** 20 / side)); // rows read at once: 4 MB of a large photo
  for (let row = 0; row < side; row += strip) {
    const rows = Math.min(strip, side - row);
    shrinkRows(read(left, top + row, side, rows), side, rows, size, filter, narrow, row);
  }
  return shrinkColumns(narrow, side, size, filter);
}

/** Which pixels make each pixel of a resized line, and their weights as fixed-point numbers. */
export function makeFilter(from, to) {
  const scale = from / to;
  const support = Math.max(scale, 1); // of the triangle, on each side
  const longest = Math.ceil(support) * 2 + 1;
  const exact = new Float64Array(to * longest);
  const starts = new Int32Array(to);
  const counts = new Int32Array(to);
  let largest = 0;
  for (let i = 0; i < to; i++) {
    const centre = scale * (i + 0.5);
    const start = Math.max(Math.trunc(centre - support + 0.5), 0);
    const end = Math.min(Math.trunc(centre + support + 0.5), from);
    const count = Math.min(Math.max(end - start, 0), longest);
    let total = 0;
    for (let j = 0; j < count; j++) {
      const distance = Math.abs((j + start - centre + 0.5) * (1 / support));
      const weight = distance < 1 ? 1 - distance : 0;
      exact[i * longest + j] = weight;
      total += weight;
    }
    for (let j = 0; j < count && total; j++) {
      exact[i * longest + j] /= total;
      largest = Math.max(largest, exact[i * longest + j]);
    }
    starts[i] = start;
    counts[i] = count;
  }
  let bits = 0; // as many as let the largest weight fit 16 bits
  while (bits < 22 && Math.trunc(0.5 + largest * 2 ** (bits + 1)) < 2 ** 15) bits++;
  const weights = Int32Array.from(exact, (weight) => Math.trunc(0.5 + weight * 2 ** bits));
  return { starts, counts, weights, longest, bits };
}

function shrinkRows(rgba, side, rows, size, filter, narrow, first) {
  const half = filter ? 1 << (filter.bits - 1) : 0;
  for (let row = 0; row < rows; row++) {
    for (let i = 0; i < size; i++) {
      const to = ((first + row) * size + i) * 3;
      if (!filter) {
        const from = (row * side + i) * 4;
        for (let c = 0; c < 3; c++) narrow[to + c] = rgba[from + c];
        continue;
      }
      let [red, green, blue] = [half, half, half];
      let from = (row * side + filter.starts[i]) * 4;
      for (let j = 0, at = i * filter.longest; j < filter.counts[i]; j++, at++, from += 4) {
        const weight = filter.weights[at];
        red += weight * rgba[from];
        green += weight * rgba[from + 1];
        blue += weight * rgba[from + 2];
      }
      narrow[to] = byte(red >> filter.bits);
      narrow[to + 1] = byte(green >> filter.bits);
      narrow[to + 2] = byte(blue >> filter.bits);
    }
  }
}

function shrinkColumns(narrow, side, size, filter) {
  const planes = new Uint8Array(3 * size * size);
  for (let row = 0; row < size; row++) {
    const start = filter ? filter.starts[row] : row;
    const count = filter ? filter.counts[row] : 1;
    for (let at = 0; at < size * 3; at++) {
      let sum = filter ? 1 << (filter.bits - 1) : 0;
      for (let j = 0; j < count; j++) {
        const weight = filter ? filter.weights[row * filter.longest + j] : 1;
        sum += weight * narrow[(start + j) * size * 3 + at];
      }
      const column = Math.floor(at / 3);
      const value = filter ? byte(sum >> filter.bits) : sum;
      planes[((at % 3) * size + row) * size + column] = value;
    }
  }
  return planes;
}

function byte(value) {
  return value < 0 ? 0 : value > 255 ? 255 : value;
}

/** The square of an image file, upright, transparent parts white; colours as they are stored.
 *
 * @param {Blob} file - An image in any format that the browser reads.
 * @param {number} size - Side of the square.
 */
export async function readPhoto(file, size) {
  const options = { imageOrientation: "from-image", colorSpaceConversion: "none" };
  const photo = await createImageBitmap(file, options);
  try {
    return centreSquare(photo.width, photo.height, size, (left, top, columns, rows) => {
      const canvas = new OffscreenCanvas(columns, rows);
      const context = canvas.getContext("2d", { willReadFrequently: true });
      context.fillStyle = "white";
      context.fillRect(0, 0, columns, rows);
      context.drawImage(photo, left, top, columns, rows, 0, 0, columns, rows);
      return context.getImageData(0, 0, columns, rows).data;
    });
  } finally {
    photo.close();
  }
}
