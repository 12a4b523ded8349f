// Small helpers. What comes from the server only ever becomes text (textContent, option values): never markup.

export const $ = (id) => document.getElementById(id);

/** An element with text and attributes. */
export function make(tag, text = "", attributes = {}) {
  const element = document.createElement(tag);
  element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

/** A copy of a <template>'s one child. */
export function stamp(id) {
  return $(id).content.firstElementChild.cloneNode(true);
}

/** Show a problem in its place, or nothing if there is none. */
export function tell(place, problem) {
  const text = problem ? problem.message || String(problem) : "";
  place.hidden = !text;
  if (place.textContent !== text) place.textContent = text;
}

/** Set text only where it changed, so that a screen reader is not told the same again. */
export function put(element, text) {
  if (element.textContent !== String(text)) element.textContent = text;
}

export function bytes(count) {
  for (const [unit, name] of [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
    if (count >= unit) return `${(count / unit).toFixed(1)} ${name}`;
  }
  return `${count} B`;
}

/** Call now and then every so often, while the page is seen; never twice at once. */
export function every(milliseconds, work) {
  const turn = async () => {
    if (!document.hidden) await work();
    setTimeout(turn, milliseconds);
  };
  turn();
}
