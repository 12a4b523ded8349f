// What goes over the wire: keys, requests, streams and metrics. Nothing here touches the page.

const API_KEY = "manylora.api-key";
const ADMIN_KEY = "manylora.admin-key";

/** Keys live in this tab's sessionStorage, and leave it in the Authorization header alone: never in a URL. */
export const keys = {
  get api() { return sessionStorage.getItem(API_KEY) ?? ""; },
  get admin() { return sessionStorage.getItem(ADMIN_KEY) ?? ""; },
  keep(api, admin) {
    for (const [name, value] of [[API_KEY, api], [ADMIN_KEY, admin]]) {
      if (value) sessionStorage.setItem(name, value);
      else sessionStorage.removeItem(name);
    }
  },
};

/** An answer of the API that is an error, in its own words. */
export class ApiFailure extends Error {
  constructor(status, error) {
    super([status || "", error?.type, error?.message].filter(Boolean).join(" · "));
    this.status = status;
  }
}

function headers(admin, json) {
  const key = admin ? keys.admin || keys.api : keys.api || keys.admin;
  return { ...(key && { Authorization: `Bearer ${key}` }), ...(json && { "Content-Type": "application/json" }) };
}

async function failure(response) {
  const text = await response.text();
  try {
    return new ApiFailure(response.status, JSON.parse(text).error);
  } catch {
    return new ApiFailure(response.status, { message: text || response.statusText });
  }
}

async function send(path, { method = "GET", body, admin = false, signal } = {}) {
  const response = await fetch(path, {
    method, signal, headers: headers(admin, body !== undefined), body: body === undefined ? undefined : JSON.stringify(body),
    cache: "no-store", credentials: "omit", referrerPolicy: "no-referrer",
  });
  if (!response.ok) throw await failure(response);
  return response;
}

/** A JSON answer. Throws ApiFailure, or TypeError if the server cannot be reached. */
export async function ask(path, options) {
  return (await send(path, options)).json();
}

/** Adapters' names may hold slashes, which belong to the path. */
export function adapterPath(name) {
  return `/v1/adapters/${encodeURIComponent(name).replaceAll("%2F", "/")}`;
}

/** The events of a streamed answer, parsed, until [DONE]. Throws ApiFailure for an error, also one within the stream. */
export async function* events(path, body, signal) {
  const response = await send(path, { method: "POST", body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ApiFailure(0, { message: "The stream ended before its end." });
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      const data = line.slice(6).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiFailure(event.error.code, event.error);
      yield event;
    }
  }
}

/** The server's metrics: name -> sum over its series. */
export async function metrics() {
  const text = await (await send("/metrics", { admin: true })).text();
  const found = new Map();
  for (const line of text.split("\n")) {
    const match = /^([a-zA-Z_:][\w:]*)(?:\{.*\})? (\S+)/.exec(line);
    if (match) found.set(match[1], (found.get(match[1]) ?? 0) + Number(match[2]));
  }
  return found;
}
