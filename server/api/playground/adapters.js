// The adapters' table, and what can be done with each: behind the admin key, where the server has one.

import { $, bytes, make, put, tell } from "./dom.js";
import { adapterPath, ask } from "./wire.js";

const SURE_MS = 4000;

/** One adapter's row. Kept from one look to the next, so that the focus stays where it is. */
class Row {
  constructor(table, name) {
    this.root = make("tr");
    this.head = make("th", name, { scope: "row" });
    this.cells = Object.fromEntries(
      [["State"], ["Tier"], ["Version", "code"], ["Rank"], ["Size", "number"], ["Running", "number"], ["Tokens made", "number"]]
        .map(([label, kind = ""]) => [label, make("td", "", { "data-label": label, class: kind })]),
    );
    const actions = make("td", "", { class: "actions" });
    const button = (text, work) => {
      const made = make("button", text, { type: "button", "aria-label": `${text} ${name}` });
      made.addEventListener("click", () => work(made));
      actions.append(made);
      return made;
    };
    this.pin = button("Pin", () =>
      table.act(`${this.pinned ? "unpinned" : "pinned"} ${name}`, adapterPath(name), { method: "PATCH", body: { pinned: !this.pinned } }));
    this.merge = button("Merge", () => {
      const mode = $("merge-mode").value;
      if (this.merged) return table.act(`unmerged ${name}`, "/v1/adapters/unmerge", { method: "POST" });
      return table.act(`merged ${name} (${mode})`, `${adapterPath(name)}/merge`, { method: "POST", body: { mode } });
    });
    this.unload = button("Unload", (made) => {
      if (made.classList.contains("sure")) return table.act(`unloaded ${name}`, adapterPath(name), { method: "DELETE" });
      this.label(made, "Really?");
      made.classList.add("sure");
      setTimeout(() => {
        made.classList.remove("sure");
        this.label(made, "Unload");
      }, SURE_MS);
    });
    this.name = name;
    this.root.append(this.head, ...Object.values(this.cells), actions);
  }

  label(button, text) {
    put(button, text);
    button.setAttribute("aria-label", `${text} ${this.name}`);
  }

  show(one, canManage) {
    this.pinned = one.pinned;
    this.merged = one.merged;
    const marks = [one.state, one.pinned && "pinned", one.merged && `merged (${one.merged})`, one.alias_of && `alias of ${one.alias_of}`];
    put(this.cells.State, marks.filter(Boolean).join(", "));
    put(this.cells.Tier, one.tier);
    put(this.cells.Version, one.version.slice(0, 12));
    put(this.cells.Rank, one.ranks.join(", "));
    put(this.cells.Size, bytes(one.bytes));
    put(this.cells.Running, one.requests_in_flight);
    put(this.cells["Tokens made"], one.generation_tokens.toLocaleString());
    this.head.title = one.warnings.join("\n");
    this.label(this.pin, one.pinned ? "Unpin" : "Pin");
    this.label(this.merge, one.merged ? "Unmerge" : "Merge");
    for (const button of [this.pin, this.merge, this.unload]) button.disabled = !canManage || one.state === "draining";
  }
}

export class Adapters {
  constructor(onChange) {
    this.onChange = onChange;
    this.rows = new Map();
    this.busy = false;
    this.failed = null;
    $("load").addEventListener("submit", (event) => {
      event.preventDefault();
      const [name, source] = [$("load-name").value.trim(), $("load-source").value.trim()];
      this.act(`loaded ${name}`, adapterPath(name), { method: "PUT", body: { source, replace: $("load-replace").checked } });
    });
  }

  /** Look again: all of the table by the admin's route, or why it cannot be seen. */
  async look() {
    try {
      this.show((await ask("/v1/adapters", { admin: true })).data);
      if (!this.failed) tell($("adapters-problem"), null);
    } catch (problem) {
      this.show([]);
      $("adapters-none").hidden = true;
      tell($("adapters-problem"), problem);
    }
  }

  show(all) {
    const seen = new Set();
    for (const one of all) {
      const key = `${one.name}\n${one.state === "draining" ? one.version : ""}`;
      seen.add(key);
      if (!this.rows.has(key)) this.rows.set(key, new Row(this, one.name));
      const row = this.rows.get(key);
      row.show(one, !this.busy);
      if (!row.root.isConnected) $("adapters").tBodies[0].append(row.root);
    }
    for (const [key, row] of this.rows) {
      if (seen.has(key)) continue;
      row.root.remove();
      this.rows.delete(key);
    }
    $("adapters-none").hidden = seen.size > 0;
  }

  /** Ask for a change, one at a time; then look at what became of it. */
  async act(done, path, options) {
    if (this.busy) return;
    this.busy = true;
    $("load-send").disabled = true;
    put($("done"), "working …");
    try {
      await ask(path, { ...options, admin: true });
      this.failed = null;
      put($("done"), done);
    } catch (problem) {
      this.failed = problem;
      put($("done"), "");
      tell($("adapters-problem"), problem);
    }
    this.busy = false;
    $("load-send").disabled = false;
    await this.look();
    await this.onChange();
  }
}
