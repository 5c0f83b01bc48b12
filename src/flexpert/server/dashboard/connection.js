// Requests to the service this page came from, with the key that the user has given. Addresses are
// relative to the page, so that it works behind a path prefix.

const KEPT = "flexpert.control_key";

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEPT),
  set: (value) => sessionStorage.setItem(KEPT, value),
  forget: () => sessionStorage.removeItem(KEPT),
};

const address = (path) => new URL(path, document.baseURI);

function headers(body) {
  const found = { accept: "application/json" };
  if (body !== undefined) found["content-type"] = "application/json";
  if (key.get()) found.authorization = `Bearer ${key.get()}`;
  return found;
}

async function refusal(response) {
  let message = `the service answered ${response.status}`;
  try { message = (await response.json()).error.message; } catch { /* no JSON: a proxy's answer */ }
  return new Refused(response.status, message);
}

export async function ask(method, path, body) {
  const response = await fetch(address(path), {
    method,
    headers: headers(body),
    body: body === undefined ? undefined : JSON.stringify(body),
    cache: "no-store",
  });
  if (!response.ok) throw await refusal(response);
  return response.json();
}

// One connection's server-sent events, each as (name, data); EventSource could not send a key.
export async function listen(path, onEvent, signal) {
  const response = await fetch(address(path), {
    headers: { ...headers(), accept: "text/event-stream" },
    cache: "no-store",
    signal,
  });
  if (!response.ok) throw await refusal(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (held + value).split("\n\n");
    held = blocks.pop();
    for (const block of blocks) {
      let name = "message";
      let data = "";
      for (const line of block.split("\n")) {
        if (line.startsWith("event: ")) name = line.slice(7);
        else if (line.startsWith("data: ")) data += line.slice(6);
      }
      if (data) onEvent(name, JSON.parse(data));
    }
  }
}
