// Threads of WebAssembly need a page that is isolated by two headers. Where the host does not send them, a service worker
// adds them, and the page is loaded once more.
if (typeof window === "undefined") {
  self.addEventListener("install", () => self.skipWaiting());
  self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));
  self.addEventListener("fetch", (event) => {
    if (new URL(event.request.url).origin !== self.location.origin) return;
    event.respondWith(
      fetch(event.request).then((response) => {
        if (response.type === "opaque" || response.status === 0) return response;
        const headers = new Headers(response.headers);
        headers.set("Cross-Origin-Opener-Policy", "same-origin");
        headers.set("Cross-Origin-Embedder-Policy", "require-corp");
        return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
      }),
    );
  });
} else if (!window.crossOriginIsolated && window.isSecureContext && navigator.serviceWorker) {
  const TRIED = "bonnx-isolated";
  navigator.serviceWorker.register("isolate.js").then(
    () => navigator.serviceWorker.ready.then(() => {
      // Once: if it does not help, one thread is enough.
      if (!sessionStorage.getItem(TRIED)) {
        sessionStorage.setItem(TRIED, "yes");
        location.reload();
      }
    }),
    () => {},
  );
}
