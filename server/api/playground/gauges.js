// The engine's own numbers, from /metrics: what is there now, and what the steps since the last look were like.

import { $, make, put, tell } from "./dom.js";
import { metrics } from "./wire.js";

const GAUGES = [
  ["rows", "Rows running"],
  ["distinct", "Adapters in a step"],
  ["rate", "Tokens a second"],
  ["slots", "Slots used"],
  ["kv", "KV pages used"],
];

export class Gauges {
  constructor() {
    this.last = null;
    this.places = new Map();
    for (const [id, label] of GAUGES) {
      const box = make("div", "", { class: "gauge" });
      const value = make("dd", "–", { id: `gauge-${id}` });
      box.append(make("dt", label), value);
      $("gauges").append(box);
      this.places.set(id, value);
    }
    this.meters = new Map(["slots", "kv"].map((id) => {
      const meter = make("meter", "", { min: 0, max: 1, "aria-hidden": "true" });
      this.places.get(id).parentElement.append(meter);
      return [id, meter];
    }));
  }

  async look() {
    try {
      this.show(await metrics(), performance.now());
      tell($("gauges-problem"), null);
    } catch (problem) {
      for (const place of this.places.values()) put(place, "–");
      tell($("gauges-problem"), problem);
    }
  }

  show(found, now) {
    const get = (name) => found.get(name) ?? 0;
    const since = (name) => get(name) - (this.last?.found.get(name) ?? 0);
    const seconds = this.last ? (now - this.last.now) / 1000 : 0;
    const steps = this.last ? since("manylora_step_distinct_adapters_count") : 0;
    const mean = steps > 0 ? since("manylora_step_distinct_adapters_sum") / steps : 0;
    const waiting = get("vllm:num_requests_waiting");
    put(this.places.get("rows"), `${get("vllm:num_requests_running")}${waiting ? ` (${waiting} wait)` : ""}`);
    put(this.places.get("distinct"), mean.toFixed(1));
    put(this.places.get("rate"), seconds > 0 ? (since("vllm:generation_tokens_total") / seconds).toFixed(0) : "–");
    const [used, all] = [get("manylora_slots_used"), get("manylora_slots")];
    put(this.places.get("slots"), `${used} of ${all}`);
    const kv = get("vllm:kv_cache_usage_perc");
    put(this.places.get("kv"), `${(100 * kv).toFixed(1)} %`);
    this.meters.get("slots").value = all ? used / all : 0;
    this.meters.get("kv").value = kv;
    this.last = { found, now };
  }
}
