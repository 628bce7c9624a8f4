// Greedy decoding: the most probable word at every step, under the options of generation.json.

/** The next id. Throws where a logit is NaN or infinite, as captioners in Python do.
 *
 * @param {Float32Array} logits - One for each entry of the vocabulary.
 * @param {number[]} ids - Those found so far.
 * @param {object} spec - The content of generation.json: the options, in ids.
 */
export function nextId(logits, ids, spec) {
  if (!Number.isFinite(logits.reduce((a, b) => Math.max(a, b), -Infinity))) {
    throw new Error( // Math.max hands NaN on; a word that never comes has -Infinity
      "The captioner computes numbers for this photo that are not finite, so it has no caption. If " +
        "that happens with every photo, the captioner is damaged: export it again.",
    );
  }
  if (ids.length < spec.prefix.length) return spec.prefix[ids.length];
  const banned = bannedIds(ids, spec);
  let best = -1;
  for (let id = 0; id < logits.length; id++) {
    if (!banned.has(id) && (best < 0 || logits[id] > logits[best])) best = id;
  }
  return best < 0 ? spec.end_id : best; // where everything is banned, the caption ends
}

/** The ids that may not come next. */
function bannedIds(ids, spec) {
  const { config, end_id: end, subwords } = spec;
  const banned = new Set(spec.banned);
  const last = ids.length + 1 === spec.max_length;
  if (subwords) banByWords(banned, ids, spec);
  else if (ids.length < config.min_length) banned.add(end);
  if (config.no_repeat_ngram) banRepeats(banned, ids, config.no_repeat_ngram);
  for (const phrase of spec.phrases) banEnd(banned, ids, phrase);
  if (spec.not_last.includes(ids.at(-1))) banned.add(end);
  if (last) for (const id of spec.not_last) banned.add(id);
  return banned;
}

/** What concerns words that consist of pieces. */
function banByWords(banned, ids, { subwords, config, prefix, end_id: end, max_length: limit }) {
  const { added, first, run_on, banned_first, not_last, not_whole } = subwords;
  if (ids.length && ids.length === prefix.length) for (const id of run_on) banned.add(id);
  if (config.min_length) {
    const begun = ids.length && first.includes(ids[0]) ? 1 : 0;
    const words = begun + ids.slice(1).filter((id) => added.includes(id)).length;
    if (words < config.min_length) banned.add(end);
  }
  for (const start of banned_first) {
    if (ids.length + 1 === start.length) banEnd(banned, ids, start);
  }
  const whole = (length) => not_whole.filter((sequence) => sequence.length === length);
  if (ids.length) {
    for (const sequence of [...not_last, ...whole(ids.length)]) {
      if (endsWith(ids, sequence)) banned.add(end);
    }
  }
  if (ids.length + 1 === limit) {
    for (const sequence of [...not_last, ...whole(limit)]) banEnd(banned, ids, sequence);
  }
}

/** Ban the last id of a sequence whose others were just found. */
function banEnd(banned, ids, sequence) {
  if (endsWith(ids, sequence.slice(0, -1))) banned.add(sequence.at(-1));
}

/** Ban every id that would complete n ids in a row for the second time. */
function banRepeats(banned, ids, n) {
  const latest = ids.slice(ids.length - n + 1);
  for (let at = 0; at + n <= ids.length; at++) {
    if (latest.every((id, i) => ids[at + i] === id)) banned.add(ids[at + n - 1]);
  }
}

function endsWith(ids, sequence) {
  const begin = ids.length - sequence.length;
  return begin >= 0 && sequence.every((id, i) => ids[begin + i] === id);
}
