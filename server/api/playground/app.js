// Puts the page together: keys, models, answers, adapters, gauges.

import { Adapters } from "./adapters.js";
import { $, every, put } from "./dom.js";
import { Gauges } from "./gauges.js";
import { Lanes } from "./lanes.js";
import { ask, keys } from "./wire.js";

const GAUGES_MS = 1000;
const TABLE_MS = 2500;

const lanes = new Lanes();
const gauges = new Gauges();
const adapters = new Adapters(models);

/** Which models there are for this key; the pill says whether requests are taken at all. */
async function models() {
  const pill = $("health");
  try {
    const all = (await ask("/v1/models")).data;
    const base = all.find((one) => one.parent === null);
    put($("base"), base?.id ?? "");
    lanes.offer([...(base ? [base.id] : []), ...all.filter((one) => one.parent !== null).map((one) => one.id)]);
    put(pill, "ready");
    pill.className = "pill good";
  } catch (problem) {
    put(pill, problem.status === 401 ? "a key is needed" : problem.message);
    pill.className = "pill bad";
  }
}

function useKeys(api, admin) {
  keys.keep(api, admin);
  $("api-key").value = api;
  $("admin-key").value = admin;
  $("keys").open = false;
  $("keys").querySelector("summary").focus();
  return Promise.all([models(), adapters.look(), gauges.look()]);
}

$("api-key").value = keys.api;
$("admin-key").value = keys.admin;
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKeys($("api-key").value.trim(), $("admin-key").value.trim());
});
$("forget").addEventListener("click", () => useKeys("", ""));
$("keys").addEventListener("keydown", (event) => {
  if (event.key === "Escape") $("keys").open = false;
});

every(GAUGES_MS, () => gauges.look());
every(TABLE_MS, async () => {
  await adapters.look();
  await models();
});
