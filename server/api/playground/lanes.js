// Up to four answers to one prompt. Each is a request of its own; the server computes them as rows of one batch.

import { $, make, put, stamp, tell } from "./dom.js";
import { events } from "./wire.js";

export const MOST = 4;
const MOST_PARTS = 4;

/** One answer: which adapters at which scales, and what came of it. */
class Lane {
  constructor(owner, name) {
    this.owner = owner;
    this.root = stamp("lane");
    this.find = (selector) => this.root.querySelector(selector);
    this.find(".remove").addEventListener("click", () => owner.remove(this));
    this.find(".add-part").addEventListener("click", () => this.addPart(owner.adapters()[0] ?? owner.base).querySelector("select").focus());
    this.addPart(name);
  }

  addPart(name) {
    const part = stamp("part");
    const [select, slider] = [part.querySelector("select"), part.querySelector("input")];
    this.fill(select, name);
    select.addEventListener("change", () => this.changed());
    slider.addEventListener("input", () => this.changed());
    part.querySelector(".drop").addEventListener("click", () => {
      part.remove();
      this.changed();
      this.find(".add-part").focus();
    });
    this.find(".parts").append(part);
    this.changed();
    return part;
  }

  fill(select, chosen) {
    const names = this.owner.names.includes(chosen) ? this.owner.names : [...this.owner.names, chosen];
    select.replaceChildren(...names.map((name) => make("option", name, { value: name })));
    select.value = chosen;
  }

  refill() {
    for (const select of this.root.querySelectorAll("select")) this.fill(select, select.value);
    this.changed();
  }

  /** What the controls say: the chosen names, the base left out, with their scales. */
  get chosen() {
    return [...this.root.querySelectorAll(".part")]
      .map((part) => ({ name: part.querySelector("select").value, scale: Number(part.querySelector("input").value) }))
      .filter(({ name }) => name !== this.owner.base);
  }

  get title() {
    const chosen = this.chosen;
    if (!chosen.length) return this.owner.base;
    return chosen.map(({ name, scale }) => (scale === 1 ? name : `${scale.toFixed(2)} ${name}`)).join(" + ");
  }

  changed() {
    const parts = [...this.root.querySelectorAll(".part")];
    for (const part of parts) {
      const isBase = part.querySelector("select").value === this.owner.base;
      const slider = part.querySelector("input");
      slider.disabled = isBase;
      put(part.querySelector("output"), isBase ? "–" : Number(slider.value).toFixed(2));
      part.querySelector(".drop").hidden = parts.length === 1;
    }
    this.find(".add-part").disabled = parts.length >= MOST_PARTS || !this.owner.adapters().length;
    put(this.find("h3"), this.title);
    this.find(".answer").setAttribute("aria-label", `Answer of ${this.title}`);
  }

  /** The fields of a request that say by whom it is answered. An adapter alone and unscaled is a model by its name. */
  get target() {
    const chosen = this.chosen;
    if (!chosen.length) return { model: this.owner.base };
    if (chosen.length === 1 && chosen[0].scale === 1) return { model: chosen[0].name };
    return { model: this.owner.base, adapters: chosen };
  }

  async run(prompt, settings, signal) {
    const isChat = settings.mode === "chat";
    const body = {
      ...this.target, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true },
      max_tokens: settings.maxTokens, temperature: settings.temperature,
      ...(isChat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
    };
    const answer = this.find(".answer");
    answer.textContent = "";
    tell(this.find(".problem"), null);
    put(this.find(".rate"), "");
    put(this.find(".figures"), "waiting");
    this.root.classList.add("running");
    const asked = performance.now();
    let first = 0, firstTokens = 0, tokens = 0, version = "", reason = "";
    const figures = () => {
      const seconds = (performance.now() - first) / 1000;
      put(this.find(".rate"), tokens > firstTokens && seconds > 0 ? `${((tokens - firstTokens) / seconds).toFixed(1)} tokens/s` : "");
      const began = first ? `first after ${((first - asked) / 1000).toFixed(2)} s` : "";
      const by = version && version !== "base" ? `version ${version}` : version;
      return [`${tokens} tokens`, began, reason, by].filter(Boolean).join(" · ");
    };
    try {
      for await (const event of events(isChat ? "/v1/chat/completions" : "/v1/completions", body, signal)) {
        const choice = event.choices?.[0];
        const text = (isChat ? choice?.delta?.content : choice?.text) ?? "";
        tokens = event.usage?.completion_tokens ?? tokens;
        if (text && !first) [first, firstTokens] = [performance.now(), tokens];
        version = event.system_fingerprint?.split("_").pop().slice(0, 12) ?? version;
        reason = choice?.finish_reason ?? reason;
        if (text) {
          const atEnd = answer.scrollHeight - answer.scrollTop - answer.clientHeight < 24;
          answer.append(text);
          if (atEnd) answer.scrollTop = answer.scrollHeight;
        }
        if (choice) put(this.find(".figures"), figures());  // the last event, of usage alone, comes with no token
      }
      return `${this.title}: ${tokens} tokens, ${reason}`;
    } catch (problem) {
      if (problem.name === "AbortError") {
        put(this.find(".figures"), `${this.find(".figures").textContent} · stopped`);
        return `${this.title}: stopped`;
      }
      tell(this.find(".problem"), problem);
      put(this.find(".figures"), "");
      return `${this.title}: failed`;
    } finally {
      this.root.classList.remove("running");
    }
  }
}

/** All answers, and the prompt that they are to. */
export class Lanes {
  constructor() {
    this.base = "";
    this.names = [];
    this.lanes = [];
    this.abort = null;
    $("add-lane").addEventListener("click", () => this.add(this.unused()).find("select").focus());
    $("stop").addEventListener("click", () => this.abort?.abort());
    $("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    $("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
    });
  }

  adapters() {
    return this.names.filter((name) => name !== this.base);
  }

  unused() {
    const taken = new Set(this.lanes.flatMap((lane) => lane.chosen.map(({ name }) => name)));
    return this.adapters().find((name) => !taken.has(name)) ?? this.base;
  }

  /** The models that may be chosen, the base first. The first time, an answer for each of the first four. */
  offer(names) {
    if (names.join("\n") === this.names.join("\n")) return;
    this.names = names;
    this.base = names[0] ?? "";
    if (!this.lanes.length) names.slice(0, MOST).forEach((name) => this.add(name));
    this.lanes.forEach((lane) => lane.refill());
  }

  add(name) {
    const lane = new Lane(this, name);
    this.lanes.push(lane);
    $("lanes").append(lane.root);
    this.counted();
    return lane;
  }

  remove(lane) {
    this.lanes.splice(this.lanes.indexOf(lane), 1);
    lane.root.remove();
    this.counted();
    $("add-lane").focus();
  }

  counted() {
    $("add-lane").disabled = this.lanes.length >= MOST;
    for (const lane of this.lanes) lane.find(".remove").hidden = this.lanes.length === 1;
  }

  async send() {
    if (this.abort) return;
    const settings = {
      mode: $("mode").value, maxTokens: Number($("max-tokens").value), temperature: Number($("temperature").value),
    };
    this.abort = new AbortController();
    $("send").disabled = true;
    $("stop").disabled = false;
    const ends = await Promise.all(this.lanes.map((lane) => lane.run($("prompt").value, settings, this.abort.signal)));
    this.abort = null;
    $("send").disabled = false;
    $("stop").disabled = true;
    put($("announce"), ends.join(". "));
  }
}
