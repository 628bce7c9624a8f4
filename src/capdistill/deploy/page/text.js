// Token ids to text, as the tokenizers of capdistill decode them.

const WORDS = "capdistill.word_tokenizer/1";
const SUBWORDS = "capdistill.subword_tokenizer/1";
const SPECIAL = ["<pad>", "<start>", "<end>", "<unk>"]; // the first ids of a vocabulary of words

/** A function from ids to text, made from the content of tokenizer.json. */
export function makeDecoder(content) {
  if (content.format === WORDS) return decodeWords([...SPECIAL, ...content.words]);
  if (content.format === SUBWORDS) return decodeSubwords(content);
  throw new Error(
    `model/tokenizer.json has the format ${JSON.stringify(content.format)}, which this page does ` +
      "not know. Write the page again with the version of capdistill that exported the captioner.",
  );
}

function decodeWords(vocabulary) {
  const [pad, start, end] = [0, 1, 2];
  return (ids) => {
    const words = ids.includes(end) ? ids.slice(0, ids.indexOf(end)) : ids;
    return words.filter((id) => id !== pad && id !== start).map((id) => vocabulary[id]).join(" ");
  };
}

function decodeSubwords({ pieces, special, end, start, tokenizer }) {
  const left_out = new Set(special);
  const steps = tokenizer.decoder ? makeSteps(tokenizer.decoder) : null;
  return (ids) => {
    const stop = ids.findIndex((id, at) => id === end && (at > 0 || id !== start));
    const kept = (stop < 0 ? ids : ids.slice(0, stop)).filter((id) => !left_out.has(id));
    let parts = kept.map((id) => pieces[id]);
    for (const step of steps ?? []) parts = step(parts);
    return parts.join(steps ? "" : " ").replace(SPACE_AT_ENDS, "");
  };
}

// What Python's `str.strip` removes; `trim` differs in a few control characters.
const SPACE = "[\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]";
const SPACE_AT_ENDS = new RegExp(`^${SPACE}+|${SPACE}+$`, "g");

/** The rule "decoder" of a tokenizer.json as functions from pieces to pieces. */
function makeSteps(rule) {
  if (rule.type === "Sequence") return rule.decoders.flatMap(makeSteps);
  if (!Object.hasOwn(STEPS, rule.type)) {
    throw new Error(
      `model/tokenizer.json joins pieces by "${rule.type}"; this page knows ` +
        `${Object.keys(STEPS).join(", ")}.`,
    );
  }
  return [STEPS[rule.type](rule)];
}

const STEPS = {
  ByteLevel: () => joinBytes,
  WordPiece: ({ prefix = "##", cleanup = true }) => (pieces) => pieces.map((piece, at) => {
    const continues = piece.startsWith(prefix);
    let part = at === 0 ? piece : continues ? piece.slice(prefix.length) : ` ${piece}`;
    for (const [found, replacement] of cleanup ? CLEANED : []) {
      part = part.replaceAll(found, replacement);
    }
    return part;
  }),
  Metaspace: ({ replacement = "▁", prepend_scheme = "always" }) => (pieces) =>
    pieces.map((piece, at) =>
      piece.replaceAll(replacement, at || prepend_scheme === "never" ? " " : "")),
  ByteFallback: () => joinFallback,
  Fuse: () => (pieces) => [pieces.join("")],
  Replace: ({ pattern, content }) => (pieces) =>
    pieces.map((piece) => piece.replaceAll(pattern.String, () => content)),
  Strip: ({ content = " ", start = 0, stop = 0 }) => (pieces) =>
    pieces.map((piece) => strip([...piece], content, start, stop)),
  BPEDecoder: ({ suffix = "</w>" }) => (pieces) =>
    pieces.map((piece, at) => piece.replaceAll(suffix, at + 1 === pieces.length ? "" : " ")),
};

const CLEANED = [
  [" .", "."], [" ?", "?"], [" !", "!"], [" ,", ","], [" ' ", "'"], [" n't", "n't"],
  [" 'm", "'m"], [" do not", " don't"], [" 's", "'s"], [" 've", "'ve"], [" 're", "'re"],
];

function fromUtf8(bytes, fatal = false) {
  return new TextDecoder("utf-8", { fatal, ignoreBOM: true }).decode(Uint8Array.from(bytes));
}

/** The bytes for which byte-level tokenizers write these 256 characters (GPT-2). */
function byteAlphabet() {
  const alphabet = new Map();
  let hidden = 256;
  for (let byte = 0; byte < 256; byte++) {
    const shown = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
    alphabet.set(String.fromCodePoint(shown ? byte : hidden++), byte);
  }
  return alphabet;
}

const BYTES = byteAlphabet();

function joinBytes(pieces) {
  const bytes = pieces.flatMap((piece) => {
    const found = [...piece].map((character) => BYTES.get(character));
    return found.includes(undefined) ? [...new TextEncoder().encode(piece)] : found;
  });
  return [fromUtf8(bytes)];
}

function joinFallback(pieces) {
  const parts = [];
  let run = [];
  const flush = () => {
    try {
      if (run.length) parts.push(fromUtf8(run, true));
    } catch {
      parts.push(...run.map(() => "\ufffd"));
    }
    run = [];
  };
  for (const piece of pieces) {
    const byte = /^<0x([0-9a-fA-F]{2})>$/.exec(piece);
    if (byte) {
      run.push(parseInt(byte[1], 16));
    } else {
      flush();
      parts.push(piece);
    }
  }
  flush();
  return parts;
}

function strip(characters, content, start, stop) {
  let [first, last] = [0, characters.length];
  while (first < Math.min(start, characters.length) && characters[first] === content) first++;
  const least = characters.length - Math.min(stop, characters.length);
  while (last > least && characters[last - 1] === content) last--;
  return characters.slice(first, Math.max(first, last)).join("");
}
