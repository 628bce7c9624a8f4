// Keeps what the page has loaded, and answers with it where there is no network.

const CACHE = `capdistill ${self.registration.scope}`;
const SHELL = [
  "./", "page.js", "page.json", "style.css", "camera.js", "worker.js", "captioner.js", "files.js",
  "greedy.js", "pixels.js", "text.js",
];

self.addEventListener("install", (event) => {
  const keep = async () => (await caches.open(CACHE)).addAll(SHELL);
  event.waitUntil(keep().then(() => self.skipWaiting()));
});

self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

self.addEventListener("fetch", (event) => {
  if (event.request.method === "GET") event.respondWith(answer(event));
});

/** What the server sends, which is kept; without a network, what was kept. */
async function answer(event) {
  const cache = await caches.open(CACHE);
  try {
    const response = await fetch(event.request);
    if (response.ok) event.waitUntil(cache.put(event.request, response.clone()).catch(() => {}));
    return response;
  } catch (error) {
    const kept = await cache.match(event.request);
    if (kept) return kept;
    throw error;
  }
}
